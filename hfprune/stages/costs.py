"""What a job takes, for the stages that say it themselves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a job takes: floating-point operations, bytes of the device's memory at most, bytes of the store."""

    flops: int
    memory_bytes: int
    disk_bytes: int
