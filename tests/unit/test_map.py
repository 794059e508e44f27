"""The house: import direction as docs/architecture.md draws it, sizes, the public names, an import that costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import trainwright as tw
from trainwright.config.document import document

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "trainwright"

# Each room imports only from itself and from rooms further up. Rooms on one line may import each other.
MAP = [
    {"errors"}, {"error_file"}, {"processes"}, {"scheduling"}, {"allocator"}, {"other_machines"}, {"position"}, {"ledger"},
    {"ledger_folder"}, {"torch_private"}, {"phases"},
    {"storage"}, {"mapped_file"},
    {"config"}, {"launcher_variables"}, {"rendezvous"}, {"distributed"}, {"exchange"},
    {"mesh"}, {"guard"}, {"data"},
    {"precision"}, {"fused"}, {"models"}, {"optim"}, {"losses"}, {"normaliser"}, {"freeze"}, {"parallel"}, {"micro_batches"},
    {"checkpoint"}, {"update"}, {"update_in_backward"},
    {"evaluate"}, {"generate"}, {"randomness"}, {"parts"}, {"whole_step"}, {"engine", "snapshot"},
    {"model_source"}, {"startup"}, {"dry_run"},
    {"monitor"}, {"launch"}, {"loading"}, {"run_folder"}, {"run_checkpoints"},
    {"run_incidents"}, {"horizon"}, {"callbacks"}, {"train"}, {"outer"}, {"run_lock"}, {"run_model"},
    {"run_summary"}, {"planner"}, {"preflight"}, {"initializing"},
    {"training_run"}, {"replaying"}, {"verification"}, {"inference"}, {"exporting"}, {"data_seen"},
    {"findings"}, {"doctor"}, {"doctor_net"}, {"facts"}, {"cli_common"}, {"cli_verify"},
    {"cli_data"}, {"cli_run"}, {"cli_plan"}, {"cli_outer"}, {"cli_launch"}, {"cli"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(MAP) for room in rooms}


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Rooms that a file imports, inside functions too; imports for type checkers alone are left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    package = ["trainwright", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{whole}.{a.name}" for a in node.names] if whole == "trainwright" else [whole]
        found |= {name.split(".")[1] for name in names if name.startswith("trainwright.")}
    return found


def test_every_room_imports_only_from_rooms_above() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        room = _room(path)
        if room == "__init__":
            continue
        assert room in LEVEL, f"{path} stands in no room of the map"
        wrong += [
            f"{path.relative_to(SOURCE)} imports {other}"
            for other in _imports(path)
            if other in LEVEL and LEVEL[other] > LEVEL[room] and other != room
        ]
    assert not wrong, "\n".join(wrong)


def test_private_torch_names_have_one_home() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        if _room(path) == "torch_private":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                if any(p.startswith("_") for p in parts) and node.module != "torch.utils._pytree":
                    wrong.append(f"{path.relative_to(SOURCE)}: {node.module}")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_readable() -> None:
    long = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text()
        if text.count("\n") > 345:
            long.append(f"{path.relative_to(SOURCE)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > 70 or len(node.args.args) + len(node.args.kwonlyargs) > 10:
                    long.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}: {size} lines")
    assert not long, "\n".join(long)


def test_public_names_exist_and_the_config_page_is_in_step() -> None:
    for name in tw.__all__:
        assert getattr(tw, name) is not None
    assert (ROOT / "docs" / "config.md").read_text() == document(), "run `make docs`"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, trainwright; print([m for m in ('torch', 'pydantic', 'rich', 'typer', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, trainwright.config, trainwright.cli; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_the_chinese_readme_keeps_step() -> None:
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    for pattern in ("```", "\n## ", "\n| "):
        assert english.count(pattern) == chinese.count(pattern), pattern
