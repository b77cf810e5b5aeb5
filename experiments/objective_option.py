"""The objective of a configuration on the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from llama_jax.objectives.base import Objective


def by_default() -> ConstructorRegistry:
    """For tyro: where the type is the protocol, an objective has the settings of its default."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is not Objective or not dataclasses.is_dataclass(info.default):
            return None
        own = StructTypeInfo.make(type(info.default), info.default, info.in_union_context)
        found: Any = ConstructorRegistry.get_struct_spec(own)
        return found

    return registry
