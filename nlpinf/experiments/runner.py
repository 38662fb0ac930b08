"""Run a recipe step by step into a folder: pretrain, finetune, query, score, report, remove and retrain.

Each step leaves its result in the folder and is skipped when the result is there; the resolved recipe lies beside them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlpinf import querystore, report
from nlpinf.adapters.huggingface import RECORD, chain_from_runs, read_json, save_run, versions, write_json
from nlpinf.checkpoints import Checkpoints
from nlpinf.data import shipped
from nlpinf.errors import BadInput
from nlpinf.experiments import recipe as recipes
from nlpinf.experiments.asking import ask
from nlpinf.experiments.building import fitted_head
from nlpinf.experiments.recipe import Recipe
from nlpinf.experiments.removal import removals
from nlpinf.experiments.stages import Progress, Recipes
from nlpinf.scoring import Scores, score
from nlpinf.stages import Stage

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a recipe gave: the scores, test loss and accuracy of the finetuned model, removals, the report's path.

    `seconds` is what this run took; `resumed` says that it found steps done before, so that the whole took longer.
    """

    scores: Scores
    test_loss: float
    accuracy: float
    removal: list[dict[str, Any]]
    report: Path
    seconds: float
    resumed: bool = False


class Runner:
    """Runs `recipe`, which has one transfer, in `out`; `progress` gets (step, done, total, note), `say` one line a step.

    `pretrain` is the folder of the pretraining (default: in `out`) and `retrained` holds pretrained stages by the rows that
    they did without; both may be shared with a runner of the same recipe with another transfer, the first of which
    `pretrains`: the pretraining is part of its time.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        progress: Progress | None = None,
        say: Say | None = None,
        *,
        pretrain: Path | None = None,
        pretrains: bool = True,
        retrained: dict[tuple[int, ...], Stage] | None = None,
    ) -> None:
        self.out, self.progress, self.say = Path(out), progress, say or (lambda _: None)
        self.pretrain, self.pretrains = pretrain or self.out / "pretrain", pretrains
        self.retrained = {} if retrained is None else retrained
        self.recipe = recipe.model_copy(update={"versions": versions()})
        (self.transfer,) = recipe.finetune.transfers
        self.make = Recipes(self.recipe, self.pretrain)
        self._claim()

    @classmethod
    def of_each(
        cls, recipe: Recipe, out: str | Path, progress: Progress | None = None, say: Say | None = None
    ) -> dict[str, Runner]:
        """Return a runner for each transfer of the recipe, by its name, in folders of these names where it has several."""
        if not isinstance(recipe.finetune.transfer, list):
            return {recipe.finetune.transfer: cls(recipe, out, progress, say)}
        runners: dict[str, Runner] = {}
        retrained: dict[tuple[int, ...], Stage] = {}
        for transfer in recipe.finetune.transfers:
            one = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"transfer": transfer})})
            runners[transfer] = cls(
                one,
                Path(out) / transfer,
                progress,
                say,
                pretrain=Path(out) / "pretrain",
                pretrains=not runners,
                retrained=retrained,
            )
        return runners

    def _claim(self) -> None:
        path = self.out / "recipe.yaml"
        if path.exists():
            if differs := recipes.difference(recipes.load(path), self.recipe):
                raise BadInput(f"{self.out}: holds a run of another recipe: {differs}; give another folder with --out")
            return
        if self.out.exists() and any(self.out.iterdir()):
            raise BadInput(f"{self.out}: is not empty and holds no recipe run; give another folder with --out")
        self.make.check()  # bad input ends here, before a folder is made
        self.out.mkdir(parents=True, exist_ok=True)
        recipes.dump(self.recipe, path)

    def run(self) -> Outcome:
        """Run what is missing and return the outcome."""
        start = time.monotonic()
        resumed = (self.out / "result.json").exists() or (self.pretrains and (self.pretrain / RECORD).exists())
        self._stages()
        self._query()
        scores = self._score()
        removal = self._remove(scores) if self.recipe.remove else []
        page = self._report(scores, removal)
        result = read_json(self.out / "result.json", "a recipe run")
        return Outcome(
            scores, result["test_loss"], result["accuracy"], removal, page, time.monotonic() - start, resumed
        )

    def _stages(self) -> None:
        pretrain, finetune = self.pretrain, self.out / "finetune"
        if (finetune / RECORD).exists():
            self.say("pretrain and finetune: done before")
            return
        seeds = {"seed": self.recipe.seed}
        if (pretrain / RECORD).exists():
            self.say("pretrain: done before")
            pretrained = Stage.from_run(pretrain)
        else:
            pretrained = self._pretrained()
        for name, rows in zip(("train", "test"), self.make.labelled):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            _write_text(self.out / "data" / f"{name}.jsonl", lines)
        finetuned, fitted = self.make.finetune(pretrained, self.transfer, self.progress)
        result, record = self.make.result(finetuned), read_json(pretrain / RECORD, "a run")
        content = {"test_loss": result.loss, "accuracy": result.accuracy, "losses": result.losses}
        content |= {"bag_of_words_accuracy": self.make.bag_of_words()}
        if "perplexity" in record:
            content["perplexity"] = record["perplexity"]
        write_json(self.out / "result.json", content)
        save_run(
            finetuned,
            finetune,
            data={"path": "../data/train.jsonl"},
            transfer="frozen" if self.transfer == "frozen" else {"proximity": self.recipe.finetune.alpha},
            parent={"run": Path(os.path.relpath(pretrain, finetune)).as_posix(), "weights": record["weights"]},
            training=fitted.training,
            **seeds,
        )

    def _pretrained(self) -> Stage:
        make, settings = self.make, self.recipe.pretrain
        data: dict[str, Any] = {"path": shipped.absolute(str(make.corpus.path)), "reading": make.reading}
        measured: dict[str, Any] = {}
        if settings.held_out:
            data = {"path": "../data/corpus.txt"}
            _write_text(self.pretrain.parent / "data" / "corpus.txt", (text + "\n" for text in make.corpus))
            measured = {"before": make.perplexity(make.untrained())}
        pretrained = make.pretrain(progress=self.progress)
        if settings.held_out:
            measured |= {"after": make.perplexity(pretrained), "rows": settings.held_out}
        more: dict[str, Any] = {"perplexity": measured} if measured else {}
        if settings.train == "head":
            more |= fitted_head(pretrained)
        training = settings.training.model_dump()
        save_run(pretrained, self.pretrain, data=data, training=training, seed=self.recipe.seed, **more)
        return pretrained

    def _query(self) -> None:
        folder, settings = self.out / "query", self.recipe.query
        if (folder / querystore.MANIFEST).exists():
            self.say("query: done before")
            return
        chain = chain_from_runs([self.pretrain, self.out / "finetune"])
        queries = self.make.queries(chain.stages[-1])
        solves = len(queries) * len(chain.links) * (settings.error_bars or 1)
        finished = 0
        last = [0]

        def follow(stage: str, iteration: int, residual: float) -> None:
            nonlocal finished
            finished += iteration <= last[0]
            last[0] = iteration
            if self.progress is not None:
                total = max(solves, finished + 1)  # a sample that grows solves anew for every size
                self.progress("query", finished, total, f"{stage}, product {iteration}, residual {residual:.1e}")

        vectors = ask(
            chain, queries, settings, self.recipe.seed, Checkpoints(querystore.solves(folder)), progress=follow
        )
        if self.progress is not None:
            done = max(solves, finished)
            self.progress("query", done, done, "")
        querystore.save(vectors, folder, chain)

    def _score(self) -> Scores:
        vectors = querystore.load(self.out / "query")
        progress = self.progress
        report_rows = None if progress is None else (lambda done, total: progress("score", done, total, "sentences"))
        settings = self.recipe.score
        return score(
            vectors,
            out=self.out / "scores",
            dedupe=settings.dedupe,
            compress=settings.compress,
            precision=settings.precision,
            compiled=settings.compile,
            part_rows=2048,
            progress=report_rows,
        )

    def _report(self, scores: Scores, removal: list[dict[str, Any]]) -> Path:
        page = self.out / "report.html"
        sources = [self.out / "recipe.yaml", *(self.out / "scores").iterdir(), *(self.out / "removal").glob("*.json")]
        if page.exists() and page.stat().st_mtime_ns > max(path.stat().st_mtime_ns for path in sources):
            self.say("report: done before")
            return page
        vectors = querystore.load(self.out / "query")
        shade = report.shader(vectors.stage, vectors.vectors)
        shown = [
            {"name": r["name"], "rows": len(r["rows"]), **{k: r[k] for k in ("predicted", "actual", "accuracy")}}
            for r in removal
        ]
        return report.write(scores, page, examples=self.recipe.report.examples, shade=shade, removal=shown or None)

    def _remove(self, scores: Scores) -> list[dict[str, Any]]:
        assert self.recipe.remove is not None
        base = read_json(self.out / "result.json", "a recipe run")
        done: list[dict[str, Any]] = []
        folder = self.out / "removal"
        folder.mkdir(exist_ok=True)
        plan = self.recipe.remove
        for removal in removals(scores, plan.share, plan.random, self.recipe.seed, helpful=plan.helpful):
            path = folder / f"{removal.name.replace(' ', '-')}.json"
            if path.exists():
                done.append(read_json(path, "a removal"))
                continue
            label = f"without {removal.name}"
            pretrained = self._retrained(removal.rows, label)
            finetuned, _ = self.make.finetune(pretrained, self.transfer, self.progress, label + ", finetune")
            result = self.make.result(finetuned)
            entry = {**asdict(removal), "actual": result.loss - base["test_loss"], **asdict(result)}
            write_json(path, entry)
            done.append(entry)
        return done

    def _retrained(self, rows: list[int], label: str) -> Stage:
        if tuple(rows) not in self.retrained:
            self.retrained[tuple(rows)] = self.make.pretrain(rows, self.progress, label)
        return self.retrained[tuple(rows)]


def _write_text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(lines), encoding="utf-8", newline="\n")
    part.replace(path)
