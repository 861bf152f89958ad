"""Peak rates of common TPUs and GPUs: the denominators of utilization, and the limits of a roofline.

All rates are peaks of one chip as its vendor publishes them: dense (no sparsity), per second, in FLOPs and bytes. A
multiply-add counts as two FLOPs. `peak_flops` is the rate of bfloat16 matrix products with float32 sums. Volta and
Turing have no bfloat16: for them it is the rate of float16, which a model in bfloat16 cannot reach.

Sources:

    TPU v4      docs.cloud.google.com/tpu/docs/v4: 275 TFLOPs, 32 GiB, 1200 GB/s; all-reduce bandwidth 1.1 PB/s per pod
                of 4096 chips. Links, network: jax-ml.github.io/scaling-book/tpus: 6 x 45 GB/s one way, 6.25 GB/s
    TPU v5e     docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GB/s, 400 GB/s both ways over the chip's
                four links, network 6.4 Tbit/s per pod of 256 chips
    TPU v5p     docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GiB, 2765 GB/s, 1200 GB/s both ways, 50 Gbit/s
    TPU v6e     docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GB/s, 800 GB/s both ways, 25.6 Tbit/s per
                pod of 256 chips
    TPU7x       docs.cloud.google.com/tpu/docs/tpu7x: 2307 TFLOPs, 192 GiB, 7380 GB/s, 1200 GB/s both ways, 100 Gbit/s;
                JAX sees each chip's two TensorCores as two devices
    Clocks      v4: arXiv 2304.01433, table 4. v5e: jax-ml.github.io/scaling-book/tpus. v5p, v6e and TPU7x: the peak
                rate divided by the FLOPs of one cycle of a device's matrix units (2**18, 2**19 and 2**19). These fit
                the compiler's estimates of a large product: 90, 70 and 80 % of that rate
    V100, T4    nvidia.com data sheets of the V100 (SXM2) and the T4
    A100, A10G  nvidia.com data sheet of the A100; data sheet of the A10G by NVIDIA and AWS
    L4, L40S    nvidia.com data sheets, half of their figures "with sparsity"; RTX 4090: the Ada architecture whitepaper
    H100, H200  nvidia.com data sheets, half of their figures "with sparsity"; B200: the HGX data sheet, also half

NVLink's published bandwidth counts both directions, so `ici_bandwidth` is half of it. It is None for GPUs that only
have PCI Express. A GPU's network depends on the cluster, so `dcn_bandwidth` is None for all GPUs.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      name: common name.
      peak_flops: dense bfloat16 FLOPs per second.
      hbm_bytes: memory of the chip, of which a program can use slightly less.
      hbm_bandwidth: bytes per second between memory and the cores.
      ici_bandwidth: bytes per second that the chip can send over all its links together, to its neighbors (TPU) or to
        the other GPUs of its host (NVLink). It can receive the same amount at the same time. None without such links.
      dcn_bandwidth: bytes per second that the chip can send over the network: its share of the bandwidth of its host.
        None if unknown.
      devices_per_chip: number of `jax.Device`s of one chip.
      ici_links: number of links that `ici_bandwidth` is spread over: two for each axis of a TPU's torus. None for GPUs.
      clock_hz: clock of a TPU's cores, in which its compiler estimates times. None for GPUs.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float | None = None
    dcn_bandwidth: float | None = None
    devices_per_chip: int = 1
    ici_links: int | None = None
    clock_hz: float | None = None


TPU_V4 = Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 270e9, 6.25e9, ici_links=6, clock_hz=1.05e9)
TPU_V5E = Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 3.125e9, ici_links=4, clock_hz=1.5e9)
TPU_V5P = Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, ici_links=6, clock_hz=1.75e9)
TPU_V6E = Chip("TPU v6e", 918e12, 32 * GIB, 1638e9, 400e9, 12.5e9, ici_links=4, clock_hz=1.75e9)
TPU_7X = Chip("TPU7x", 2307e12, 192 * GIB, 7380e9, 600e9, 12.5e9, devices_per_chip=2, ici_links=6, clock_hz=2.2e9)

# By `jax.Device.device_kind`: first the names that libtpu uses today, then those of other versions of libtpu.
_TPUS = {
    "TPU v4": TPU_V4,
    "TPU v5 lite": TPU_V5E,
    "TPU v5": TPU_V5P,
    "TPU v6 lite": TPU_V6E,
    "TPU7x": TPU_7X,
    "TPU v5e": TPU_V5E,
    "TPU v5p": TPU_V5P,
    "TPU v6e": TPU_V6E,
    "TPU 7x": TPU_7X,
    "TPU v7x": TPU_7X,
}

# A GPU's device kind is the name of the product ("NVIDIA A100-SXM4-80GB", "Tesla T4"). The first entry whose words all
# occur in it applies, so entries with more words come first. NVIDIA's gigabytes of memory are GiB.
_GPUS = (
    (("B200",), Chip("B200", 2250e12, 180 * GIB, 8000e9, ici_bandwidth=900e9)),
    (("H200",), Chip("H200", 989.5e12, 141 * GIB, 4800e9, ici_bandwidth=450e9)),
    (("H100", "PCIe"), Chip("H100 PCIe", 756.5e12, 80 * GIB, 2000e9, ici_bandwidth=300e9)),
    (("H100", "NVL"), Chip("H100 NVL", 835.5e12, 94 * GIB, 3900e9, ici_bandwidth=300e9)),
    (("H100",), Chip("H100 SXM", 989.5e12, 80 * GIB, 3350e9, ici_bandwidth=450e9)),
    (("A100", "80GB", "PCIe"), Chip("A100 80GB PCIe", 312e12, 80 * GIB, 1935e9, ici_bandwidth=300e9)),
    (("A100", "80GB"), Chip("A100 80GB", 312e12, 80 * GIB, 2039e9, ici_bandwidth=300e9)),
    (("A100",), Chip("A100 40GB", 312e12, 40 * GIB, 1555e9, ici_bandwidth=300e9)),
    (("A10G",), Chip("A10G", 70e12, 24 * GIB, 600e9)),
    (("L40S",), Chip("L40S", 362e12, 48 * GIB, 864e9)),
    (("L4",), Chip("L4", 121e12, 24 * GIB, 300e9)),
    (("RTX", "4090"), Chip("RTX 4090", 165.2e12, 24 * GIB, 1008e9)),
    (("T4",), Chip("T4", 65e12, 16 * GIB, 320e9)),
    (("V100", "32GB"), Chip("V100 32GB", 125e12, 32 * GIB, 900e9, ici_bandwidth=150e9)),
    (("V100",), Chip("V100 16GB", 125e12, 16 * GIB, 900e9, ici_bandwidth=150e9)),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind` such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None if unknown.

    A part of a GPU (MIG) counts as unknown: its rates differ from the GPU's.
    """
    kind = device_kind.lower()
    for name, chip in _TPUS.items():
        if kind == name.lower():
            return chip
    words = kind.replace("-", " ").split()
    if "mig" in words:
        return None
    for names, chip in _GPUS:
        if all(name.lower() in words for name in names):
            return chip
    return None
