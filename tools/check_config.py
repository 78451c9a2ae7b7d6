"""Check a configuration, and name in one line all that a run would miss.

python -m tools.check_config train|test CONFIG [key=value ...]
"""

from engine.configuration import read_config
from utils.errors import ConfigError, run_program

USAGE = "usage: python -m tools.check_config train|test CONFIG [key=value ...]"


def main(argv: list[str]) -> None:
    match argv:
        case ["train" | "test" as purpose, path, *overrides]:
            read_config(path, overrides, purpose, complete=purpose == "train")
        case _:
            raise ConfigError(USAGE)


if __name__ == "__main__":
    run_program(main)
