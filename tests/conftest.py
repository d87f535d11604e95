"""Shared by all tests: the environment that must be set before JAX is first imported."""

import os

import hypothesis

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# a loaded machine must not fail a test, and two runs must test the same
hypothesis.settings.register_profile("untimed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("untimed")
