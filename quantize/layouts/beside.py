"""What a checkpoint holds beside NVFP4 weights, for the config that describes it."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.layouts.base.base_format import BaseFormat


@dataclass(frozen=True)
class Beside:
    """What is beside the NVFP4 weights.

    Attributes:
        eight_bit: formats of 8 bits, each with the module paths of what is in it, linears and
            experts.
        nvfp4: module paths of those in NVFP4: a config for several formats names each.
        weight_only: those of them whose activations stay floats, though the others' do not.
        experts_by_name: a config that names experts names each one, as earlier versions of this
            package wrote it, and has no patterns for them.
        kv_cache: how engines are to keep keys and values, one of the layout's ``kv_caches``; None:
            as they like.
    """

    eight_bit: tuple[tuple[BaseFormat, tuple[str, ...]], ...] = ()
    nvfp4: tuple[str, ...] = ()
    kv_cache: str | None = None
    weight_only: tuple[str, ...] = ()
    experts_by_name: bool = False

    @property
    def several(self) -> bool:
        """Whether modules differ, so that a config has to name them."""
        return bool(self.eight_bit or self.weight_only)


NOTHING = Beside()
