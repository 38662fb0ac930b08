"""Run a recipe step by step into a folder: pretrain, finetune, query, score, report, remove and retrain.

Each step leaves its result in the folder and is skipped when the result is there; the resolved recipe lies beside them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlpinf import querystore, report
from nlpinf.adapters.huggingface import RECORD, chain_from_runs, read_json, save_run, versions, write_json
from nlpinf.data import shipped
from nlpinf.errors import BadInput
from nlpinf.experiments import recipe as recipes
from nlpinf.experiments.recipe import Recipe, RelativeDamping
from nlpinf.experiments.removal import removals
from nlpinf.experiments.stages import Progress, Recipes
from nlpinf.influence import Relative, query_vectors
from nlpinf.scoring import Scores, score
from nlpinf.solvers import CG
from nlpinf.stages import Stage

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a recipe gave: the scores, test loss and accuracy of the finetuned model, removals, the report's path, seconds."""

    scores: Scores
    test_loss: float
    accuracy: float
    removal: list[dict[str, Any]]
    report: Path
    seconds: float


class Runner:
    """Runs `recipe` in `out`; `progress` gets (step, done, total, note), `say` one line a step."""

    def __init__(
        self, recipe: Recipe, out: str | Path, progress: Progress | None = None, say: Say | None = None
    ) -> None:
        self.out, self.progress, self.say = Path(out), progress, say or (lambda _: None)
        self.recipe = recipe.model_copy(update={"versions": versions()})
        self.make = Recipes(self.recipe, self.out / "pretrain")
        self._claim()

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
        self._stages()
        self._query()
        scores = self._score()
        removal = self._remove(scores) if self.recipe.remove else []
        page = self._report(scores, removal)
        result = read_json(self.out / "result.json", "a recipe run")
        return Outcome(scores, result["test_loss"], result["accuracy"], removal, page, time.monotonic() - start)

    def _stages(self) -> None:
        pretrain, finetune = self.out / "pretrain", self.out / "finetune"
        if (finetune / RECORD).exists():
            self.say("pretrain and finetune: done before")
            return
        seeds = {"seed": self.recipe.seed}
        if (pretrain / RECORD).exists():
            self.say("pretrain: done before")
            pretrained = Stage.from_run(pretrain)
        else:
            pretrained = self.make.pretrain(progress=self.progress)
            where = str(self.make.corpus.path)
            where = where if where.startswith(shipped.PREFIX) else str(Path(where).resolve())
            data = {"path": where, "reading": {"empty": self.recipe.pretrain.empty}}
            save_run(pretrained, pretrain, data=data, training=self.recipe.pretrain.training.model_dump(), **seeds)
        for name, rows in zip(("train", "test"), self.make.labelled):
            _write_rows(self.out / "data" / f"{name}.jsonl", rows)
        finetuned = self.make.finetune(pretrained, self.progress)
        result = self.make.result(finetuned)
        write_json(self.out / "result.json", {"test_loss": result.loss, "accuracy": result.accuracy})
        settings = self.recipe.finetune
        save_run(
            finetuned,
            finetune,
            data={"path": "../data/train.jsonl"},
            transfer="frozen" if settings.transfer == "frozen" else {"proximity": settings.alpha},
            parent={"run": "../pretrain", "weights": read_json(pretrain / RECORD, "a run")["weights"]},
            training=settings.training.model_dump(),
            **seeds,
        )

    def _query(self) -> None:
        folder, settings = self.out / "query", self.recipe.query
        if (folder / querystore.MANIFEST).exists():
            self.say("query: done before")
            return
        chain = chain_from_runs([self.out / "pretrain", self.out / "finetune"])
        given = settings.damping if isinstance(settings.damping, list) else [settings.damping] * len(chain.links)
        damping = [Relative(d.relative) if isinstance(d, RelativeDamping) else d for d in given]
        queries = self.make.queries(chain.stages[-1])
        solves = len(queries) * len(chain.links)
        finished = 0
        last = [0]

        def follow(stage: str, iteration: int, residual: float) -> None:
            nonlocal finished
            finished += iteration <= last[0]
            last[0] = iteration
            if self.progress is not None:
                self.progress("query", finished, solves, f"{stage}, product {iteration}, residual {residual:.1e}")

        vectors = query_vectors(
            chain,
            queries,
            curvature=settings.curvature,
            damping=damping,
            solver=CG(settings.tolerance, settings.max_iterations),
            sample=settings.sample,
            seed=self.recipe.seed,
            allow_unconverged=settings.allow_unconverged,
            progress=follow,
        )
        if self.progress is not None:
            self.progress("query", solves, solves, "")
        querystore.save(vectors, folder, chain)

    def _score(self) -> Scores:
        vectors = querystore.load(self.out / "query")
        progress = self.progress
        report_rows = None if progress is None else (lambda done, total: progress("score", done, total, "sentences"))
        return score(vectors, out=self.out / "scores", part_rows=2048, progress=report_rows)

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
        for removal in removals(scores, self.recipe.remove.share, self.recipe.remove.random, self.recipe.seed):
            path = folder / f"{removal.name.replace(' ', '-')}.json"
            if path.exists():
                done.append(read_json(path, "a removal"))
                continue
            label = f"without {removal.name}"
            pretrained = self.make.pretrain(removal.rows, self.progress, label)
            result = self.make.result(self.make.finetune(pretrained, self.progress, label + ", finetune"))
            entry = {**asdict(removal), "actual": result.loss - base["test_loss"], **asdict(result)}
            write_json(path, entry)
            done.append(entry)
        return done


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
