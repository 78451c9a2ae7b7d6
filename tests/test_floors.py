"""The rooms of the project stand on floors: imports run down only, and rooms of one floor do not know each other."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FLOORS = {"utils": 1, "datasets": 2, "modules": 2, "engine": 3, "inference": 4, "tools": 5, "benchmarks": 5}
PROGRAMS_AT_THE_TOP = {"train": 5, "test": 5, "hubconf": 5}


def room_of(module):
    """The room, or the program at the top, that a dotted module name or a file's path belongs to; None elsewhere."""
    name = module.split(".")[0]
    return name if name in FLOORS or name in PROGRAMS_AT_THE_TOP else None


def sources():
    rooms = [path for room in FLOORS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    return rooms + [path for name in PROGRAMS_AT_THE_TOP if (path := REPOSITORY / f"{name}.py").exists()]


def imported_modules(path):
    """Dotted names of all modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def is_program(path):
    return '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_run_down_and_never_to_a_neighbour(path):
    floors = FLOORS | PROGRAMS_AT_THE_TOP
    own = room_of(module_name(path))
    for module in imported_modules(path):
        room = room_of(module)
        if room is not None and room != own:
            assert floors[room] < floors[own], f"{path.name} of {own}/ imports {module}"


def test_no_program_imports_another_program():
    programs = {module_name(path) for path in sources() if is_program(path)}
    assert {"train", "test", "tools.prepare_data"} <= programs
    # utils.config and utils.config_schema are libraries that can also be run.
    programs = {name for name in programs if not name.startswith("utils.")}
    for path in sources():
        if found := programs & set(imported_modules(path)):
            raise AssertionError(f"{module_name(path)} imports the program {found}")


def test_a_helper_module_of_the_tests_is_no_test():
    """Builders that tests share live in tests/tiny.py and tests/textbook.py; no test file imports another."""
    for path in sorted((REPOSITORY / "tests").glob("test_*.py")):
        shared = [name for name in imported_modules(path) if name and name.startswith(("test_", "conftest"))]
        assert not shared, f"{path.name} imports {shared}"
