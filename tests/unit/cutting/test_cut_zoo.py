"""One architecture of each kind of interface, cut at four places each; the whole list is tests.bench.cut_zoo."""

from __future__ import annotations

import pytest
import torch

from tests.bench.cut_zoo import FAST, ZOO, check


@pytest.mark.parametrize("name", FAST)
def test_cuts_verify(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = check(name, ZOO[name])
    finally:
        torch.set_num_threads(threads)
    assert len(found["cuts"]) >= 3
    assert found["dynamic_batch"], found["notes"]
    assert all(row["relative"] <= 1e-4 for row in found["cuts"])


def test_the_list_covers_the_families() -> None:
    families = ("mobilenetv2", "mobilenetv3", "mnasnet", "semnasnet", "spnasnet", "fbnet", "nasnetalarge", "ghostnet_",
                "ghostnetv2", "efficientnet_lite", "efficientformer_", "efficientformerv2", "shvit", "nextvit", "mobilevit_",
                "mobilevitv2", "fasternet", "efficientvit", "mobileone", "repvit", "starnet", "fastvit", "convnext", "resnet",
                "densenet", "inception_v3", "swin_tiny", "vit_tiny")  # fmt: skip
    assert len(ZOO) >= 40
    assert set(FAST) <= set(ZOO)
    for family in families:
        assert any(name.startswith(family) for name in ZOO), family
