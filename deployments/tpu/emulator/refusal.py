"""What the API answers in place of a result."""

from __future__ import annotations

import grpc


class Refusal(Exception):
    """A call that ends with a gRPC status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code, self.message = code, message


def not_found(name: str) -> Refusal:
    """NOT_FOUND: there is no resource `name`."""
    return Refusal(grpc.StatusCode.NOT_FOUND, f"Resource '{name}' was not found")


def invalid(field: str, value: object, remedy: str) -> Refusal:
    """INVALID_ARGUMENT, naming the field, its value and what is wanted in its place."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{field}={value!r}: {remedy}")


def precondition(message: str) -> Refusal:
    """FAILED_PRECONDITION: the resource's state does not allow it."""
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, message)
