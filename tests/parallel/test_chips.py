"""Device kinds as drivers report them, and rates that agree with independently published figures."""

import pytest

from alignvlm_jax.parallel import chips

KINDS = {
    "TPU v4": "TPU v4",
    "TPU v5 lite": "TPU v5e",
    "TPU v5": "TPU v5p",
    "TPU v5p": "TPU v5p",
    "TPU v6 lite": "TPU v6e",
    "TPU7x": "TPU7x",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB PCIe",
    "NVIDIA A10G": "A10G",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100 16GB",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_kind_names_its_chip(kind):
    assert chips.find_chip(kind).name == KINDS[kind]


@pytest.mark.parametrize(
    "kind",
    # L40 and MIG instances must not match L40S and the complete H100.
    ["cpu", "", "TPU v3", "TPU v9", "NVIDIA GeForce GTX 1080", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_an_unknown_device_has_no_chip(kind):
    assert chips.find_chip(kind) is None


@pytest.mark.parametrize(
    ("chip", "pod_chips", "pod_flops", "pod_all_reduce"),
    [
        (chips.TPU_V4, 4096, 1.1e18, 1.1e15),
        (chips.TPU_V5E, 256, 50.63e15, 51.2e12),
        (chips.TPU_V6E, 256, 234.9e15, 102.4e12),
    ],
)
def test_chips_add_up_to_googles_published_pods(chip, pod_chips, pod_flops, pod_all_reduce):
    """A pod's published all-reduce bandwidth is the sum over the links of all its chips, in one direction."""
    assert pod_chips * chip.peak_flops == pytest.approx(pod_flops, rel=0.03)
    assert pod_chips * chip.ici_bandwidth == pytest.approx(pod_all_reduce, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_rates_have_plausible_units(kind):
    chip = chips.find_chip(kind)
    assert 5e13 < chip.peak_flops < 5e15
    assert 2**30 * 15 < chip.hbm_bytes < 2**30 * 200
    assert 2e11 < chip.hbm_bandwidth < 1e13
    for link, fastest in ((chip.ici_bandwidth, chip.hbm_bandwidth), (chip.dcn_bandwidth, chip.ici_bandwidth)):
        assert link is None or link < fastest
