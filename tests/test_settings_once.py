"""A setting is declared once, and a method stands in its own file and in one line of a table."""

from __future__ import annotations

import ast
import importlib
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from safe_rlhf_v import algorithms
from safe_rlhf_v.algorithms import DIRECT, ITERATIVE, ONLINE
from safe_rlhf_v.config import Settings, walk
from tests.training.fake_roles import trainer

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("safe_rlhf_v", "guard") for path in (ROOT / package).rglob("*.py")]
CONFIG = ROOT / "safe_rlhf_v" / "config"
Declared = set[tuple[str, str]]


def declared(path: Path) -> dict[str, Declared]:
    """Of each class of a file, (name, default) of the fields whose default is a value."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            fields = [(x.target, x.value) for x in node.body if isinstance(x, ast.AnnAssign) and x.value is not None]
            known = {(ast.unparse(target), default(value)) for target, value in fields}
            found[node.name] = {(name, value) for name, value in known if value != "None"}
    return found


def default(value: ast.expr) -> str:
    """A value as text; of `Field(0.1, ...)` and `field(default=0.1)` what it is by default."""
    if isinstance(value, ast.Call):
        named = [x.value for x in value.keywords if x.arg == "default"]
        return default((value.args or named or [ast.Constant(None)])[0])
    return ast.unparse(value)


def twice(sections: dict[str, Declared], classes: dict[str, Declared]) -> list[tuple[str, str]]:
    """(class, section) where half of a class's settings, two at least, stand in the section with the same defaults."""
    return [
        (name, section)
        for name, own in classes.items()
        for section, fields in sections.items()
        if len(own & fields) >= 2 and len(own) <= 2 * len(own & fields)
    ]


def test_no_field_is_declared_twice() -> None:
    sections = {name: fields for path in CONFIG.glob("*.py") for name, fields in declared(path).items()}
    assert len(sections) > 15 and sum(map(len, sections.values())) > 60  # of which the method's fields are none
    for path in FILES:
        if path.parent != CONFIG:
            assert not twice(sections, declared(path)), path


def test_the_count_sees_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("class A(S):\n    lr: Rate = Field(0.1, description='x')\n    k: int = 3\n")
    (tmp_path / "own.py").write_text("class B:\n    k: Annotated[int, 'x'] = 3\n    lr: float = field(default=0.1)\n")
    assert twice(declared(tmp_path / "config.py"), declared(tmp_path / "own.py")) == [("B", "A")]


def test_no_method_is_named_or_imported_outside_its_file_and_the_table() -> None:
    names = {*ONLINE, *DIRECT, *ITERATIVE}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if path.parent.name != "algorithms":
                assert named not in names, f"{path}: {named}"
                assert module.rpartition("safe_rlhf_v.algorithms.")[2] not in ONLINE, path


@pytest.mark.parametrize("table", [ONLINE, DIRECT])
def test_a_method_is_named_as_its_file(table: dict[str, type]) -> None:
    assert {kind.__module__.rpartition(".")[2]: kind for kind in table.values()} == table


TOY = '''
"""A toy: the reward less the cost, times the multiplier, at every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from safe_rlhf_v.algorithms.constrained import Lagrangian
from safe_rlhf_v.fields import NonNegative, Rate
from safe_rlhf_v.losses import clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class Toy(Lagrangian):
    """A = r - lam c."""

    words: ClassVar[str] = "for a test"
    beta: Annotated[NonNegative, "Not used."] = 0.3
    reach: Annotated[Rate, "Clip range of the toy."] = 0.25

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        return Advantages(policy=(rollout.rewards - multiplier * rollout.costs)[:, None] * rollout.responses.mask)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        return clipped_surrogate(logps, rollout.logps, advantages.policy, rollout.responses.mask, self.reach), {}
'''


@pytest.fixture
def with_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package of settings as it is once a file and a line are added. (docs/design.md, "An online algorithm")"""
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY).lstrip())
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    monkeypatch.setitem(ONLINE, "toy", importlib.import_module("safe_rlhf_v.algorithms.toy").Toy)
    for name in [name for name in sys.modules if name.startswith("safe_rlhf_v.config.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "safe_rlhf_v.config")
    monkeypatch.setattr(sys.modules["safe_rlhf_v"], "config", None)
    yield importlib.import_module("safe_rlhf_v.config")
    sys.modules.pop("safe_rlhf_v.algorithms.toy")


def test_an_online_algorithm_is_a_file_and_a_line(with_toy: Any, tmp_path: Path) -> None:
    table = {name: info.description for name, info in with_toy.walk(with_toy.Settings)}
    added = {name for name in table if name not in dict(walk(Settings))}
    assert added == {f"policy.toy.{name}" for name in ("reach", "window", "delay")}
    assert table["policy.toy.reach"] == "Clip range of the toy."
    assert "toy: for a test" in table["policy.algorithm"] and "toy 0.3" in table["policy.beta"]
    with pytest.raises(with_toy.SettingsError, match=r"policy\.toy\.reach = 0: .*greater than 0"):
        with_toy.load_settings(None, ["policy.toy.reach=0"])
    chosen = ["policy.algorithm=toy", "policy.toy.reach=0.4", "policy.toy.window=0", "policy.dual.initial=1"]
    policy = with_toy.load_settings(None, chosen).policy
    method = policy.made(threshold=-0.2)
    assert (method.reach, method.beta, method.threshold, method.delay) == (0.4, 0.3, -0.2, 1)
    rows = trainer(tmp_path / "run", method, policy.rule(), max_steps=2, guidance_rollouts=0).train().metrics
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["multiplier"] == 1.0 != rows[1]["multiplier"]  # delay 1
