"""The house keeps its measure: rooms of at most a dozen modules, modules of at most 400 lines unless their first line says why."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("protos", "splitters", "edge_client", "edge_server", "deploy")
MOST_MODULES = 12
MOST_LINES = 400
MEDIAN_LINES = 150


def modules() -> list[Path]:
    """Every hand-written module of the shipped packages; protoc's output is not ours to arrange."""
    found = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "_pb2" not in p.name]
    assert len(found) > 300  # the search itself works
    return found


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_a_room_holds_at_most_a_dozen_modules() -> None:
    rooms = Counter(path.parent.relative_to(ROOT) for path in modules() if path.name != "__init__.py")
    assert {str(room): n for room, n in rooms.items() if n > MOST_MODULES} == {}


def test_unit_tests_lie_in_rooms_too() -> None:
    unit = ROOT / "tests" / "unit"
    rooms = Counter(path.parent.relative_to(ROOT) for path in unit.rglob("test_*.py"))
    assert Path("tests/unit") not in rooms
    assert {str(room): n for room, n in rooms.items() if n > MOST_MODULES} == {}
    without = [str(room) for room in rooms if not (ROOT / room / "__init__.py").is_file()]
    assert without == []  # two tests of one name in two rooms need packages


def test_a_module_past_400_lines_says_why_in_its_first_line() -> None:
    long = [path for path in modules() if len(lines(path)) > MOST_LINES]
    assert [str(p.relative_to(ROOT)) for p in long if "over 400 lines:" not in lines(p)[0].lower()] == []


def test_half_of_the_modules_fit_on_two_screens() -> None:
    sizes = sorted(len(lines(p)) for p in modules())
    assert sizes[len(sizes) // 2] <= MEDIAN_LINES
