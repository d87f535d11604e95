"""The `tpu` worker type for Prefect work pools: flow runs on Cloud TPU slices."""

from deployments.tpu.worker import TPUWorker

__all__ = ["TPUWorker"]
