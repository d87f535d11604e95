"""The `tpu` work pool: flow runs on Cloud TPU slices, real or simulated."""
