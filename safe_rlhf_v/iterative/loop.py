"""The loop of iterative dualisation (CAID, arXiv 2505.19387). It knows a problem and a dual, and no model.

    lam from the one-shot solution
    repeat:  fit theta to lam  ->  measure it on-policy  ->  log, move lam, save

One iteration is one-shot dualisation (MoCAN, PeCAN). A killed run goes on in the iteration it was killed in.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from safe_rlhf_v import duals
from safe_rlhf_v.algorithms.caid import Iterate, Measured, adapted_rates, best, summarise
from safe_rlhf_v.algorithms.can import OneShotSolution
from safe_rlhf_v.arguments import IterativeArguments
from safe_rlhf_v.files import replace_text
from safe_rlhf_v.statistics import Interval, Resampling

STATE = "iterations.json"
FEW = 5.0  # effective samples a prompt below which an importance estimate says little [ours]
log = logging.getLogger(__name__)


class Problem(Protocol):
    """What is aligned, and to what. Everything random in it follows from its seed and the iteration's number."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the K constraints."""
        ...

    @property
    def bounds(self) -> Tensor:
        """(K,) b: by how much E g must rise above the reference's."""
        ...

    def one_shot(self) -> tuple[OneShotSolution, list[float]]:
        """The one-shot solution on samples of the reference, and a step size for each multiplier."""
        ...

    def fit(self, multipliers: Sequence[float], iteration: int) -> None:
        """Make the policy of this iteration: argmax of L(pi, multipliers). Called again, it goes on or does nothing."""
        ...

    def measure(self, multipliers: Sequence[float], iteration: int) -> Measured:
        """Look at this iteration's policy, on its own samples."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IterativeResult:
    """best: position in iterates of the one to use, None where the one-shot verdict is "infeasible" and none was made.

    feasible: whether the best one keeps every bound. multipliers: where the dual stands after the last iteration.
    """

    one_shot: OneShotSolution
    iterates: list[Iterate]
    best: int | None
    feasible: bool
    multipliers: tuple[float, ...]


def iterate(problem: Problem, args: IterativeArguments) -> IterativeResult:
    """Run or go on with the loop. Writes to output_dir: iterations.json, metrics.jsonl (a line an iteration).

    Bounds out of reach are a result, not an error: see `IterativeResult`.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    state = _load(folder / STATE) or _begin(problem, args)
    solution = OneShotSolution(**{k: _tuple(v) for k, v in state["one_shot"].items()})
    if solution.verdict == "infeasible":
        _save(folder / STATE, state)
        return IterativeResult(one_shot=solution, iterates=[], best=None, feasible=False, multipliers=())
    rates, multipliers = list(state["rates"]), duals.VectorState(state["dual"]["value"])
    iterates = [_iterate(row) for row in state["iterates"]]
    resampling = Resampling(level=args.confidence, draws=args.bootstrap)
    for number in range(len(iterates) + 1, args.iterations + 1):
        started = time.perf_counter()
        problem.fit(multipliers.value, number)
        measured = problem.measure(multipliers.value, number)
        one = summarise(measured, number, multipliers.value, problem.bounds, resampling)
        if iterates and args.eta == "auto":
            rates = adapted_rates(rates, iterates[-1], one)
        dual = duals.VectorDual(lr=tuple(rates), initial=solution.multipliers)
        multipliers = dual.step(multipliers, [-u for u in one.slack])
        iterates.append(one)
        for warning in warnings_of(one):
            log.warning(warning)
        before = state["one_shot_seconds"] if number == 1 else 0.0
        row = metrics_row(one, problem.names, problem.bounds.tolist()) | {
            "seconds": round(before + time.perf_counter() - started, 3)
        }
        state |= {"iterates": [asdict(x) for x in iterates], "dual": duals.to_json(multipliers), "rates": rates}
        state["rows"] = [*state["rows"], row]
        _save(folder / STATE, state)
        replace_text(folder / "metrics.jsonl", "".join(json.dumps(x, allow_nan=False) + "\n" for x in state["rows"]))
    chosen, feasible = best(iterates)
    return IterativeResult(
        one_shot=solution, iterates=iterates, best=chosen, feasible=feasible, multipliers=multipliers.value
    )


def metrics_row(one: Iterate, names: Sequence[str], bounds: Sequence[float]) -> dict[str, Any]:
    """A line of metrics.jsonl: estimates as {value, low, high, n}; what each constraint has, by its name."""
    by_name = lambda values: dict(zip(names, values, strict=True))  # noqa: E731
    return {
        "step": one.iteration,
        "multiplier": by_name(one.multipliers),
        **{name: asdict(getattr(one, name)) for name in ("primal", "dual", "gap", "suboptimality")},
        "requested": by_name(bounds),
        "improvement": by_name(asdict(x) for x in one.improvement),
        "slack": by_name(one.slack),
        "feasible": one.shortfall <= 0,
        "reward": one.reward,
        "kl": one.kl,
        "dual_estimates": one.duals,
        "effective_samples": one.effective,
    }


def warnings_of(one: Iterate) -> list[str]:
    """What a reader of an iteration's figures has to know, in words."""
    if one.effective >= FEW:
        return []
    return [
        f"iteration {one.iteration}: the estimate of the dual value rests on {one.effective:.1f} effective samples a "
        f"prompt, fewer than {FEW}; gap and suboptimality come out too low. Raise iterative.samples or iterative.beta"
    ]


def summary(result: IterativeResult, names: Sequence[str], bounds: Any) -> dict[str, Any]:
    """What done.json holds of a result that has a best iterate: its figures, and the one-shot solution's."""
    chosen = result.iterates[result.best or 0]
    by_name = lambda values: dict(zip(names, values, strict=True))  # noqa: E731
    return {
        "iterations": len(result.iterates),
        "best_iteration": chosen.iteration,
        "feasible": result.feasible,
        "requested": bounds,
        "improvement": by_name(x.value for x in chosen.improvement),
        "multiplier": by_name(chosen.multipliers),
        "best": {name: getattr(chosen, name).value for name in ("primal", "dual", "gap", "suboptimality")},
        "reward": chosen.reward,
        "kl": chosen.kl,
        "effective_samples": chosen.effective,
        "one_shot": {
            "verdict": result.one_shot.verdict,
            "multipliers": result.one_shot.multipliers,
            "reachable": result.one_shot.reachable,
            "improvement": by_name(x.value for x in result.iterates[0].improvement),
        },
    }


def _begin(problem: Problem, args: IterativeArguments) -> dict[str, Any]:
    started = time.perf_counter()
    solution, rates = problem.one_shot()
    if args.eta != "auto":
        rates = [args.eta] * len(solution.multipliers)
    start = duals.VectorState(solution.multipliers)
    return {
        "one_shot": asdict(solution), "rates": rates, "dual": duals.to_json(start), "iterates": [], "rows": [],
        "one_shot_seconds": time.perf_counter() - started,
    }  # fmt: skip


def _iterate(row: Mapping[str, Any]) -> Iterate:
    """What `asdict` made of an Iterate, as it was."""
    interval = lambda x: Interval(**{"n": 0, **x})  # noqa: E731  # version 0.1 wrote no n
    estimates = {name: interval(row[name]) for name in ("primal", "dual", "gap", "suboptimality")}
    improvement = tuple(map(interval, row["improvement"]))
    return Iterate(**{**{k: _tuple(v) for k, v in row.items()}, **estimates, "improvement": improvement})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _load(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _save(path: Path, state: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(state, allow_nan=False))
