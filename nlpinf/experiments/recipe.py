"""A recipe: one YAML file that says everything about an experiment, checked before anything runs."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nlpinf.errors import BadInput
from nlpinf.stages import Precision


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingSettings(_Strict):
    """How a stage is trained: Adam, linear warm-up and decay."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)


class TokenizerSettings(_Strict):
    """The tokenizer that is trained on the pretraining corpus; `kind` by default wordpiece for a masked LM, bpe for a causal one."""

    kind: Literal["wordpiece", "bpe"] | None = None
    size: int = Field(4000, ge=64)
    lowercase: bool = True


class PretrainSettings(_Strict):
    """The first stage.

    `model` is a Hugging Face config (`type` and its own fields) to train from scratch with a tokenizer of its own, or the
    folder of a pretrained model, whose tokenizer is used; for a bilm the sizes of an ELMo. `preset` (small, medium,
    original) stands for sizes that are not named. `train: head` fits what is not the encoder's and leaves the encoder as
    it is; scores are of all parameters all the same. A bilm has a `vocabulary` of so many words, and a softmax sampled
    with `negatives` (0: the full one; default: by the vocabulary's size). The last `held_out` rows of the corpus are not
    trained on: the perplexity before and after is measured on them.
    """

    corpus: str
    text_column: str = "text"
    split: str | None = None
    task: Literal["masked_lm", "causal_lm", "bilm"] = "masked_lm"
    empty: Literal["error", "skip"] = "error"
    held_out: int = Field(0, ge=0)
    vocabulary: int = Field(8000, ge=4)
    negatives: int | None = Field(None, ge=0)
    tokenizer: TokenizerSettings = TokenizerSettings()  # type: ignore[call-arg]
    model: dict[str, Any] | str
    train: Literal["all", "head"] = "all"
    max_length: int = Field(64, ge=2)
    masks: int = Field(1, ge=1)
    probability: float = Field(0.15, gt=0, lt=1)
    reduction: Literal["example", "token"] = "example"
    training: TrainingSettings = TrainingSettings()  # type: ignore[call-arg]


class HeadChoice(_Strict):
    """The classification head: a mix of layers or the last, a BiLSTM (`lstm` units) or none, pooling, linear or one hidden layer."""

    pooling: Literal["mean", "max", "attention", "first"] = "mean"
    hidden: int = Field(0, ge=0)
    layers: Literal["last", "mix"] = "last"
    lstm: int = Field(0, ge=0)


Transfer = Literal["proximity", "frozen"]


class FinetuneSettings(_Strict):
    """The second stage: `test` names a file, or `test_share` of `data` is held out by the seed.

    A list of transfers finetunes, asks and scores once for each, in folders of their names.
    """

    data: str
    test: str | None = None
    test_share: float = Field(0.2, gt=0, lt=1)
    labels: int = Field(2, ge=2)
    max_length: int | None = Field(None, ge=1)
    head: HeadChoice = HeadChoice()  # type: ignore[call-arg]
    transfer: Transfer | Annotated[list[Transfer], Field(min_length=1)] = "proximity"
    alpha: float = Field(1e-3, gt=0)
    training: TrainingSettings = TrainingSettings()  # type: ignore[call-arg]

    @property
    def transfers(self) -> list[Transfer]:
        """The transfers, one or several."""
        return list(dict.fromkeys(self.transfer)) if isinstance(self.transfer, list) else [self.transfer]


class RelativeDamping(_Strict):
    """Damping as a multiple of the curvature's mean eigenvalue."""

    relative: float = Field(ge=0)


Damping = Annotated[float, Field(ge=0, allow_inf_nan=False)] | RelativeDamping | Literal["auto"]
Sample = Annotated[int, Field(ge=1)] | None


CurvatureName = Literal["ggn", "hessian", "fisher", "auto"]
SolverName = Literal["cg", "minres", "lissa", "direct"]
PreconditionerName = Literal["none", "diagonal", "ekfac", "nystrom", "ekfac+nystrom", "spectral"]


class QuerySettings(_Strict):
    """What is asked, and how it is pulled back.

    `damping` (a number, `relative` to the mean eigenvalue, or "auto", the smallest that the sample determines) and `sample` (rows that
    carry the curvature; null for all, "auto" for at most 1,024, half of the corpus) are one for both stages or a list: pretraining,
    finetuning. `sample: grow` takes twice as many rows, from 1,024 on and up to
    `sample_limit`, until the order of the scores no longer changes. `error_bars: K` solves on K disjoint samples, so that
    scores get standard errors. `solver: direct` is EK-FAC's inverse, with its residual; `precision` makes the products of cg
    in low precision, refined to the same residual.
    """

    misclassified: int = Field(3, ge=0)
    curvature: CurvatureName = "ggn"
    damping: Damping | list[Damping] = "auto"
    sample: Sample | Literal["grow", "auto"] | list[Sample] = None
    sample_limit: int | None = Field(None, ge=1)
    error_bars: int | None = Field(None, ge=2)
    solver: SolverName = "cg"
    preconditioner: PreconditionerName = "none"
    precision: Precision | None = None
    tolerance: float = Field(1e-3, gt=0, lt=1)
    max_iterations: int = Field(1000, ge=1)
    allow_unconverged: bool = False

    @model_validator(mode="after")
    def _compatible(self) -> QuerySettings:
        if self.precision is not None and self.solver != "cg":
            raise BadInput(f"precision goes with the solver cg, not with {self.solver}")
        if self.sample_limit is not None and self.sample != "grow":
            raise BadInput("sample_limit goes with the sample grow")
        if self.error_bars is not None and self.sample in (None, "grow"):
            kind = "one that grows" if self.sample else "none: all rows carry the curvature"
            raise BadInput(f"error_bars needs a sample of a fixed size, a number of rows or auto, but it has {kind}")
        return self


class ScoreSettings(_Strict):
    """How the corpus is scored: `nlpinf score --help` says what these do.

    `compile` takes half a minute to begin with; `compress` is the error allowed; `dedupe` scores equal texts once.
    """

    precision: Literal["bfloat16"] | None = None
    compile: bool = False
    compress: float | None = Field(None, gt=0, lt=1)
    dedupe: bool = False

    @model_validator(mode="after")
    def _compatible(self) -> ScoreSettings:
        if self.precision is not None and self.compress is not None:
            raise BadInput("compress is chosen and measured in full precision; leave out precision, or compress")
        return self


class ReportSettings(_Strict):
    """The page: `examples` sentences in each table."""

    examples: int = Field(10, ge=1)


class RemoveSettings(_Strict):
    """Remove `share` of the corpus (most harmful, `random` draws, most helpful unless not `helpful`), retrain both stages, compare."""

    share: float = Field(0.05, gt=0, lt=1)
    random: int = Field(3, ge=0)
    helpful: bool = True


class Recipe(_Strict):
    """A whole experiment. `versions` is written by a run, for the record."""

    name: str
    seed: int = Field(0, ge=0, lt=2**32)
    pretrain: PretrainSettings
    finetune: FinetuneSettings
    query: QuerySettings = QuerySettings()  # type: ignore[call-arg]
    score: ScoreSettings = ScoreSettings()  # type: ignore[call-arg]
    report: ReportSettings = ReportSettings()  # type: ignore[call-arg]
    remove: RemoveSettings | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _compatible(self) -> Recipe:
        if self.score.compress is not None and self.query.error_bars is not None:
            raise BadInput("score.compress gives no standard errors; leave it out, or query.error_bars")
        if self.score.dedupe and self.remove is not None:
            raise BadInput("score.dedupe scores one of equal rows, but remove takes out rows one by one; leave one out")
        return self


Settings = TypeVar("Settings", bound=_Strict)


def load(path: str | Path) -> Recipe:
    """Read a recipe file; a key that does not exist is refused with the nearest one that does."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such recipe; give the path of a YAML file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder; give the recipe file in it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return parse(content, str(path))


def parse(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe's content; `where` is named in errors."""
    return checked(Recipe, content, where)


def checked(kind: type[Settings], content: dict[str, Any], where: str) -> Settings:
    """Return settings of this kind, of a recipe or of a part of one; `where` is named in errors."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"{where}: {_told(min(error.errors(), key=_rank))}") from None


def _rank(error: Any) -> int:
    """Order errors so that the first is the cause of the others: each form that a value might have adds its own."""
    if error["type"] == "extra_forbidden":
        return 0
    return 2 if error["type"] == "missing" else 3 if error["type"].endswith(("_type", "_parsing")) else 1


def _told(error: Any) -> str:
    forms = (
        "constrained-float",
        "constrained-int",
        "float",
        "int",
        "RelativeDamping",
        "list[",
        "literal[",
    )  # pydantic names the form that it tried
    place = [str(part) for part in error["loc"] if not str(part).startswith(forms)]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = _fields(place[:-1])
        near = difflib.get_close_matches(place[-1], known, 1, 0.0) if known else []
        return f"there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    if error["type"] == "missing":
        return f"the key {key!r} is missing; add it"
    if error["type"] == "value_error":  # settings that do not go together
        return ": ".join(filter(None, (key, str(error["ctx"]["error"]))))
    return f"{key}: {error['msg'][:1].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _fields(place: list[str]) -> list[str]:
    model: Any = Recipe
    for part in place:
        if part.isdigit():  # a place in a list of the model found
            continue
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def dump(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every default spelt out."""
    part = path.with_name(path.name + ".part")
    part.write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    part.replace(path)


def difference(one: Recipe, two: Recipe) -> str | None:
    """Return the first key in which two recipes differ, versions aside."""

    def first(a: Any, b: Any, place: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in [*a, *(k for k in b if k not in a)]:
                if found := first(a.get(key), b.get(key), f"{place}.{key}" if place else key):
                    return found
            return None
        return None if a == b else f"{place} ({a!r} there, {b!r} now)"

    skipped = {"versions"}
    return first(one.model_dump(exclude=skipped), two.model_dump(exclude=skipped), "")
