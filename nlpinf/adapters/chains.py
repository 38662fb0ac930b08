"""Run folders become a Chain: what each stage received is matched, and how it was passed on recorded, given or fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nlpinf.adapters.folders import RECORD
from nlpinf.adapters.matching import Matching, match, received
from nlpinf.adapters.peft import ADAPTERS
from nlpinf.adapters.runs import Told, stage_from_run
from nlpinf.curvature import curvature_samples
from nlpinf.errors import BadInput
from nlpinf.proximity import FittedProximity, fit_proximity
from nlpinf.stages import Chain, Proximity, Stage, Transfer

FIT_ROWS = 4096  # finetuning rows that α̂'s gradient averages over


@dataclass(frozen=True)
class OpenedChain:
    """A chain of runs, and what was found out in opening it: lines for a reader, and the same for a manifest."""

    chain: Chain
    matchings: tuple[Matching, ...] = ()
    fitted: tuple[FittedProximity | None, ...] = ()
    lines: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def chain_from_runs(folders: Sequence[str | Path], *, alpha: float | None = None, **changes: Any) -> Chain:
    """Open runs, the pretraining first, as a Chain; see `open_chain`."""
    return open_chain(folders, alpha=alpha, **changes).chain


def open_chain(
    folders: Sequence[str | Path],
    *,
    alpha: float | None = None,
    told: Sequence[Told | None] | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> OpenedChain:
    """Open runs, the pretraining first, as a Chain; the transfer of each is as it was recorded.

    Of a run that recorded none: an encoder that is its parent's to the bit was frozen; for another one `alpha` is the
    proximity, or else α̂ is fitted, on at most `FIT_ROWS` rows. Raises `BadInput` if a run recorded another α (an α that a
    run was trained with is used as it is), if α̂ ≤ 0, or if an encoder is not its parent's in names and shapes.
    """
    given = None if alpha is None else Proximity(alpha)
    known = list(told) if told is not None else [None] * len(folders)
    stages: list[Stage] = []
    for folder, each in zip(folders, known):
        base = folders[0] if (Path(folder) / ADAPTERS).exists() and stages else None
        stages.append(stage_from_run(folder, told=each, base=base, trust_remote_code=trust_remote_code, **changes))
    lines = [f"{s.name}: {n}" for s in stages for n in _notes(s)]
    matchings, fits, transfers, shared = [], [], [], []
    for k, folder in enumerate(map(Path, folders[1:]), 1):
        parent, stage = stages[k - 1], stages[k]
        _same_words(parent, stage, folder)
        _same_parent(parent, stage, folder)
        matching = match(parent, stage)
        lines.append(f"{stage.name} from {parent.name}: {matching}")
        stage, names = received(stage, matching)
        stage = _frozen(parent, stage, names)
        how, fit = _transfer(folder / RECORD, parent, stage, names, given)
        if fit is not None:
            lines.append(f"{stage.name}: no proximity term was recorded or given; fitted {fit}")
        stages[k] = stage
        matchings.append(matching)
        fits.append(fit)
        transfers.append(how)
        shared.append(names)
    facts = {
        "assumed": {s.name: list(_notes(s)) for s in stages if _notes(s)},
        "received": [str(m) for m in matchings],
        "fitted": [None if f is None else {"alpha": f.alpha, "residual": f.residual} for f in fits],
    }
    chain = Chain(stages, transfer=transfers, shared=shared)
    return OpenedChain(chain, tuple(matchings), tuple(fits), tuple(lines), facts)


def _notes(stage: Stage) -> list[str]:
    return [*(f"assumed: {line}" for line in stage.record.get("assumed", ())), *stage.record.get("notes", ())]


def _frozen(parent: Stage, stage: Stage, names: dict[str, str]) -> Stage:
    """Return the stage without training what it has from its parent to the bit, where nobody recorded what it trained."""
    if stage.record.get("recorded", True):
        return stage
    same = {n for n, t in names.items() if n in stage.decay and torch.equal(stage.parameters[n], parent.parameters[t])}
    if not same:
        return stage
    kept = {n: value for n, value in stage.decay.items() if n not in same}
    return replace(stage, trained=tuple(kept), weight_decay=kept)


def _transfer(
    path: Path, parent: Stage, stage: Stage, names: dict[str, str], given: Proximity | None
) -> tuple[Transfer, FittedProximity | None]:
    recorded = stage.record.get("transfer")
    if recorded is None:
        if not any(n in stage.decay for n in names):
            if given is not None:
                raise BadInput(
                    f"{path.parent}: its encoder was frozen, but α = {given.alpha} was given; leave --alpha out"
                )
            return "frozen", None
        if given is not None:
            return given, None
        rows, _ = curvature_samples(stage.size, min(FIT_ROWS, stage.size), 0)
        fit = fit_proximity(parent, stage, names, rows)
        try:
            return fit.required(), fit
        except BadInput as error:
            raise BadInput(f"{path.parent}: {error}") from None
    how: Transfer
    if recorded == "frozen":
        how = "frozen"
    elif isinstance(recorded, dict) and isinstance(recorded.get("proximity"), int | float):
        try:
            how = Proximity(float(recorded["proximity"]))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
    else:
        raise BadInput(f'{path}: the transfer {recorded!r} is neither "frozen" nor {{"proximity": α}}; correct it')
    if given is not None and given != how:
        told = "frozen" if how == "frozen" else f"trained with α = {recorded['proximity']}"
        raise BadInput(f"{path}: the run was {told}, but α = {given.alpha} was given; leave --alpha out")
    return how, None


def _same_parent(parent: Stage, stage: Stage, folder: Path) -> None:
    expected = stage.record.get("parent", {}).get("weights")
    # Or finetuned from the files that the parent has its encoder of, before its head was fitted.
    known = (parent.record.get("weights"), parent.record.get("encoder", {}).get("weights"))
    if expected and expected not in known:
        raise BadInput(
            f"{folder}: was finetuned from other weights than those in {parent.record['run']} (sha256 differs); give the run that it descends from"
        )


def _same_words(parent: Stage, stage: Stage, folder: Path) -> None:
    """Raise `BadInput` unless the stage's tokenizer has its parent's words; it may have more behind them."""
    one, two = (getattr(s.task, "tokenizer", None) for s in (parent, stage))
    if one is None or two is None:
        return
    theirs, ours = one.get_vocab(), two.get_vocab()
    odd = [w for w, i in theirs.items() if ours.get(w) != i] + [
        w for w, i in ours.items() if w not in theirs and i < len(theirs)
    ]
    if odd:
        raise BadInput(
            f"{folder}: its tokenizer is not that of the pretraining run (first difference: {min(odd)!r}); a finetuned run shares its parent's words"
        )
