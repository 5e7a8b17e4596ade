"""How raw outputs become an answer, declared as data: which columns are box, score and class, in what form, and what remains.

A declaration is JSON: one of the presets that ship with the package, or a user's file. Nothing in it is code.
"""

from splitters.tasks.decoding.box_form import BoxForm, grid
from splitters.tasks.decoding.columns import Columns, activate
from splitters.tasks.decoding.declaration import (
    DECODED,
    Decoding,
    Preset,
    declared_decoding,
    preset_names,
    read_other_task,
    read_preset,
)
from splitters.tasks.decoding.declared import MAX_CANDIDATES, Declared, Kept, declared

__all__ = [
    "DECODED", "MAX_CANDIDATES", "BoxForm", "Columns", "Declared", "Decoding", "Kept", "Preset",
    "activate", "declared", "declared_decoding", "grid", "preset_names", "read_other_task", "read_preset",
]  # fmt: skip
