"""Writes the reference pages that follow from the code: every command's help, every setting of the TOML files.

    python docs/generate_reference.py [--check]

``--check`` writes nothing and ends with 1 where a page differs from what the code says.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

os.environ["COLUMNS"] = "110"
HERE = Path(__file__).parent


def _parsers() -> dict[str, argparse.ArgumentParser]:
    from deploy.testbed.cli import build_parser as testbed
    from edge_client.cli import build_parser as client
    from edge_client.doctor.command import build_parser as doctor
    from edge_server.cli import build_parser as server
    from splitters.cli import build_parser as splitters

    found: dict[str, argparse.ArgumentParser] = {}
    for name, parser in {
        "edge-client": client(),
        "edge-client doctor": doctor(),
        "edge-server": server(),
        "splitters": splitters(),
        "edge-testbed": testbed(),
    }.items():
        parser.prog = name
        found[name] = parser
        for action in parser._actions:  # noqa: SLF001 - argparse has no public way to list its verbs
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
                found |= {f"{name} {verb}": sub for verb, sub in action.choices.items()}
    return found


def cli_page() -> str:
    """Every command's help as it prints it."""
    text = "# Command line\n\nWritten by `python docs/generate_reference.py` from the commands themselves.\n"
    for name, parser in _parsers().items():
        parser.prog = name
        text += f"\n{'##' if ' ' not in name else '###'} {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n"
    return text


def config_page() -> str:
    """Every setting of `edge-client --config`, with its meaning from the dataclass's docstring."""
    from edge_client.config import ClientConfig

    about = dict(re.findall(r"^        ([a-z_, ]+): (.+(?:\n {12}.+)*)", ClientConfig.__doc__ or "", re.MULTILINE))
    meanings = {name: " ".join(text.split()) for names, text in about.items() for name in names.split(", ")}
    text = (
        "# Configuration\n\nWritten by `python docs/generate_reference.py` from the code.\n\n"
        "`edge-client --config FILE` reads TOML. A key is an option's long name, with `_` or `-`. An unknown key\n"
        "or a wrong type is refused by name. The command line goes before the file.\n"
        "Secrets come from the environment only (`HEADTAIL_TOKEN`).\n\n"
        "| key | default | meaning |\n|---|---|---|\n"
    )
    for field in fields(ClientConfig):
        default = "required" if field.name == "camera" else f"`{field.default}`"
        meaning = meanings.get(field.name, f"see `edge-client --help`, `--{field.name.replace('_', '-')}`").replace("``", "`")
        text += f"| `{field.name}` | {default} | {meaning} |\n".replace("| `None` |", "| |").replace("| `` |", "| |")
    return text + (
        "\n| environment variable | meaning |\n|---|---|\n"
        "| `HEADTAIL_TOKEN` | the client's token |\n"
        "| `HEADTAIL_CACHE` | where fetched and exported bundles lie; default `~/.cache/headtail` |\n"
        "| `HEADTAIL_DATA` | folder of photographs, videos and traces for benches and optional tests |\n"
    )


def main() -> int:
    """Writes the pages, or checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page is not what the code says")
    args = parser.parse_args()
    stale = []
    for name, text in {"cli.md": cli_page(), "config.md": config_page()}.items():
        path = HERE / "reference" / name
        if args.check:
            stale += [name] if not path.is_file() or path.read_text(encoding="utf-8") != text else []
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"docs/reference/{', '.join(stale)} differ from the code; run python docs/generate_reference.py")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
