"""The cost of a job, for stages that compute their own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of a job: floating-point operations, peak bytes of the device's memory, bytes in the store."""

    flops: int
    memory_bytes: int
    disk_bytes: int
