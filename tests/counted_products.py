"""How much a program really multiplies: its jaxpr, without what nobody reads, run operation by operation and loops turn by turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal
from jax.interpreters import partial_eval


def product_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of all matrix products of `function(*arguments)` on one device, two for each multiplication."""
    closed = jax.make_jaxpr(function)(*arguments)
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    counter = _Counter()
    counter.run(needed, closed.consts, jax.tree.leaves(arguments))
    return counter.flops


class _Counter:
    flops = 0

    def run(self, jaxpr: Jaxpr, consts: list[Any], arguments: list[Any]) -> list[Any]:
        values: dict[Any, Any] = {**dict(zip(jaxpr.constvars, consts, strict=True)), **dict(zip(jaxpr.invars, arguments, strict=True))}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            values.update(zip(equation.outvars, self._apply(equation, [read(atom) for atom in equation.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, operands: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(params, operands)
        if name == "while":
            return self._while(params, operands)
        inner = params.get("call_jaxpr", params.get("jaxpr"))
        if inner is not None:
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", []), operands)
        assert name not in ("cond", "pallas_call"), f"products inside {name} are not counted"
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            self.flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(operands[0].shape[axis] for axis in summed)
        result = equation.primitive.bind(*operands, **params)
        return list(result) if equation.primitive.multiple_results else [result]

    def _scan(self, params: dict[str, Any], operands: list[Any]) -> list[Any]:
        fixed, carried = params["num_consts"], params["num_carry"]
        consts, carry, stacked = operands[:fixed], operands[fixed : fixed + carried], operands[fixed + carried :]
        body, order = params["jaxpr"], range(params["length"])
        rows = []
        for index in reversed(order) if params["reverse"] else order:
            outputs = self.run(body.jaxpr, body.consts, [*consts, *carry, *(x[index] for x in stacked)])
            carry = outputs[:carried]
            rows.append(outputs[carried:])
        if params["reverse"]:
            rows.reverse()
        return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]

    def _while(self, params: dict[str, Any], operands: list[Any]) -> list[Any]:
        asked, done = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        condition, body, carry = params["cond_jaxpr"], params["body_jaxpr"], operands[done:]
        while self.run(condition.jaxpr, condition.consts, [*operands[:asked], *carry])[0]:
            carry = self.run(body.jaxpr, body.consts, [*operands[asked:done], *carry])
        return carry
