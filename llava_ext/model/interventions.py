"""The opt-in interventions: what each flag is, which values it may have, which flags go together.

Plain standard library: the workflow's config schema, the training command line and the model's configuration are all
made from :class:`Interventions`, and the file is copied beside exported checkpoints. With every field at its default
the model is vanilla LLaVA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

# The published code's constants, measured on Vicuna-7B: clip the norm of each token at MAX_NORM, then scale by SCALE.
VICUNA_7B_MAX_NORM = 1.22
VICUNA_7B_SCALE = 0.83
DEFAULT_LAYERS = (12, 16, 20, 24)
DEFAULT_SPARSITY = 4
PUBLISHED_GRID_SIDE = 24
PUBLISHED_SPARSITY = 4
NAMED_STATISTICS = ("vicuna-7b", "auto")


class InterventionError(ValueError):
    """Interventions that cannot work; the message names key, value, what is allowed and the fix."""


def _doc(text: str) -> dict[str, str]:
    """Help for the command line and description for the schema are one text."""
    return {"help": text, "description": text}


@dataclass(frozen=True)
class Interventions:
    """The flags of one experiment. Immutable and hashable; ``validate`` before use."""

    # pydantic reads this when the class is a field of a configuration section
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    normalize_projector: bool = field(
        default=False,
        metadata=_doc(
            "Normalise each projected vision token: RMS norm with a learned weight, then clip its Euclidean norm at "
            "projector_max_norm and multiply by projector_scale, so that vision tokens are as long as text tokens."
        ),
    )
    normalize_statistics: str = field(
        default="vicuna-7b",
        metadata=_doc(
            "Where the two numbers of normalize_projector come from: `vicuna-7b` (the published constants 1.22 and 0.83), `auto` "
            "(measured: the mean norm of the LLM's own token embeddings), or two numbers `MAX_NORM,SCALE`."
        ),
    )
    projector_max_norm: float | None = field(
        default=None,
        metadata=_doc(
            "The resolved clip of normalize_projector. Filled in from normalize_statistics and saved; leave it out."
        ),
    )
    projector_scale: float | None = field(
        default=None,
        metadata=_doc(
            "The resolved factor of normalize_projector. Filled in from normalize_statistics and saved; leave it out."
        ),
    )
    use_multilayer_features: bool = field(
        default=False,
        metadata=_doc(
            "Feed the projector the patches of several vision layers, each after the tower's final layer norm, "
            "concatenated on the channels, instead of one layer's."
        ),
    )
    multilayer_layers: tuple[int, ...] = field(
        default=DEFAULT_LAYERS,
        metadata=_doc(
            "Vision layers for use_multilayer_features, counted from 1 (first layer's output) to the number of layers."
        ),
    )
    compression_after_projection: bool = field(
        default=False,
        metadata=_doc("Average-pool the projected patch grid down to final_spatial_size tokens."),
    )
    final_spatial_size: int | None = field(
        default=None,
        metadata=_doc(
            "Number of vision tokens after compression_after_projection: the square of a divisor of the tower's grid side "
            "(24 for CLIP-L/336: 1, 4, 9, 16, 36, 64, 144 or 576)."
        ),
    )
    twoD_vision_embedding: bool = field(
        default=False,
        metadata=_doc(
            "Rotary positions in two dimensions for vision tokens: half of the rotary frequencies turn by the row, half by the column."
        ),
    )
    interleave: bool = field(
        default=False,
        metadata=_doc(
            "Write the coordinates `row,column` as text tokens after every interleave_sparsity-th vision token."
        ),
    )
    interleave_sparsity: int | None = field(
        default=None,
        metadata=_doc(
            "Coordinates follow every this many vision tokens (4 if left out). Only with interleave."
        ),
    )
    add_spatial_coordinates: bool = field(
        default=False,
        metadata=_doc(
            "Append each patch's x and y in [-1, 1] as two channels to the vision features before the projector."
        ),
    )
    published_behaviour: bool = field(
        default=False,
        metadata=_doc(
            "Do what the authors' published code does where it differs from its description, for checkpoints trained with it: "
            "final_spatial_size is the side, coordinates count on a grid of 24 and follow every 4th token whatever interleave_sparsity "
            "says, twoD_vision_embedding shares one table per batch. See docs/interventions.md."
        ),
    )

    def __post_init__(self) -> None:
        # YAML gives lists and numbers where JSON, the command line and the dataclass have tuples and text.
        layers: Any = self.multilayer_layers
        if isinstance(layers, list):
            object.__setattr__(self, "multilayer_layers", tuple(layers))
        statistics: Any = self.normalize_statistics
        if isinstance(statistics, (list, tuple)):
            object.__setattr__(self, "normalize_statistics", ",".join(f"{number:g}" for number in statistics))

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], ignore_unknown: bool = False) -> Interventions:
        """Builds from a mapping (a JSON object). Raises :class:`InterventionError` for an unknown key."""
        unknown = [key for key in values if key not in FIELD_NAMES]
        if unknown and not ignore_unknown:
            raise InterventionError(
                f"interventions: unknown key {unknown[0]!r}; allowed: {', '.join(FIELD_NAMES)}"
            )
        return cls(**{key: value for key, value in values.items() if key in FIELD_NAMES})

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        values = dataclasses.asdict(self)
        values["multilayer_layers"] = list(self.multilayer_layers)
        return values

    # -- meaning --------------------------------------------------------------------------------------------------

    @property
    def is_vanilla(self) -> bool:
        """True when no flag is on: the model is LLaVA itself."""
        return not self.active

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the flags that are on, in the order of their definition."""
        return tuple(name for name in FLAGS if getattr(self, name))

    @property
    def sparsity(self) -> int:
        """Vision tokens between two interleaved coordinates."""
        if self.published_behaviour:
            return PUBLISHED_SPARSITY
        return DEFAULT_SPARSITY if self.interleave_sparsity is None else self.interleave_sparsity

    @property
    def feature_layers(self) -> tuple[int, ...] | None:
        """The vision layers that are concatenated, or None for LLaVA's single layer."""
        return self.multilayer_layers if self.use_multilayer_features else None

    def final_side(self, grid_side: int) -> int:
        """Side of the grid of vision tokens that the LLM gets, from the tower's ``grid_side``."""
        if not self.compression_after_projection or self.final_spatial_size is None:
            return grid_side
        return self.final_spatial_size if self.published_behaviour else math.isqrt(self.final_spatial_size)

    def tokens_per_image(self, grid_side: int, extra_tokens: int = 0) -> int:
        """Vision tokens of one image, without interleaved coordinates.

        Args:
            grid_side: patches along one side of the tower's square grid.
            extra_tokens: 1 when the CLS token is kept (`cls_patch`), else 0.
        """
        return self.final_side(grid_side) ** 2 + extra_tokens

    def coordinates(self, index: int, side: int) -> tuple[int, int]:
        """(row, column) that interleave writes after vision token ``index`` (0-based) of a grid with this side."""
        return divmod(index, PUBLISHED_GRID_SIDE if self.published_behaviour else side)

    def projector_width(self, vision_width: int) -> int:
        """Input channels of the projector for a tower whose hidden states have ``vision_width`` channels."""
        layers = len(self.multilayer_layers) if self.use_multilayer_features else 1
        return vision_width * layers + (2 if self.add_spatial_coordinates else 0)

    def with_statistics(self, max_norm: float, scale: float) -> Interventions:
        """The same flags with the normalisation's numbers filled in."""
        return dataclasses.replace(self, projector_max_norm=float(max_norm), projector_scale=float(scale))

    def fixed_statistics(self) -> tuple[float, float] | None:
        """(max_norm, scale) when they are known without looking at an LLM, else None (`auto`)."""
        if self.projector_max_norm is not None and self.projector_scale is not None:
            return self.projector_max_norm, self.projector_scale
        if self.normalize_statistics == "vicuna-7b":
            return VICUNA_7B_MAX_NORM, VICUNA_7B_SCALE
        if self.normalize_statistics == "auto":
            return None
        numbers = _two_positive_numbers(self.normalize_statistics)
        if numbers is None:
            raise InterventionError(self._statistics_problem())
        return numbers

    def differences(self, other: Interventions) -> list[str]:
        """One line for each field in which ``other`` would give a different model: `key: mine against other's`."""
        mine, others = self._meaning(), other._meaning()
        return [
            f"{key}: {mine.get(key)!r} against {others.get(key)!r}"
            for key in FIELD_NAMES
            if mine.get(key) != others.get(key)
        ]

    def _meaning(self) -> dict[str, Any]:
        """The fields that change the model: those of flags that are off do not."""
        values = {name: value for name, value in self.to_dict().items() if name in FLAGS}
        if self.normalize_projector:
            statistics = self.fixed_statistics()
            values["projector_max_norm"], values["projector_scale"] = statistics or (None, None)
        if self.use_multilayer_features:
            values["multilayer_layers"] = list(self.multilayer_layers)
        if self.compression_after_projection:
            values["final_spatial_size"] = self.final_spatial_size
        if self.interleave:
            values["interleave_sparsity"] = self.sparsity
        if not self.is_vanilla:
            values["published_behaviour"] = self.published_behaviour
        return values

    # -- checks ---------------------------------------------------------------------------------------------------

    def problems(
        self, grid_side: int | None = None, num_tower_layers: int | None = None, keeps_cls: bool = False
    ) -> list[str]:
        """Every reason why these flags cannot work, as readable lines; empty when they can.

        Args:
            grid_side: patches along one side of the vision tower's grid; None checks only what does not need it.
            num_tower_layers: the vision tower's number of layers; None likewise.
            keeps_cls: the CLS token goes to the LLM too (`cls_patch`, transformers' `full`), so tokens are no grid.
        """
        found = self._normalize_problems() + self._multilayer_problems(num_tower_layers)
        found += self._compression_problems(grid_side) + self._interleave_problems(grid_side)
        found += self._published_problems()
        if keeps_cls:
            found += [
                f"{name}: needs a grid of patches, but the CLS token is kept; use mm_vision_select_feature: patch or turn {name} off"
                for name in GRID_FLAGS
                if getattr(self, name)
            ]
        if self.twoD_vision_embedding and self._single_token(grid_side):
            found.append(
                "twoD_vision_embedding: has no effect with one vision token (final_spatial_size 1); "
                "turn it off or use final_spatial_size of at least 4"
            )
        return found

    def validate(
        self, grid_side: int | None = None, num_tower_layers: int | None = None, keeps_cls: bool = False
    ) -> None:
        """Raises :class:`InterventionError` with all of :meth:`problems`, if there are any."""
        found = self.problems(grid_side, num_tower_layers, keeps_cls)
        if found:
            raise InterventionError("\n".join(found))

    def _statistics_problem(self) -> str:
        return (
            f"normalize_statistics: found {self.normalize_statistics!r}; allowed are `vicuna-7b`, `auto`, or two positive numbers "
            "`MAX_NORM,SCALE` such as `1.22,0.83`"
        )

    def _normalize_problems(self) -> list[str]:
        found = []
        if (
            self.normalize_statistics not in NAMED_STATISTICS
            and _two_positive_numbers(self.normalize_statistics) is None
        ):
            found.append(self._statistics_problem())
        if self.normalize_statistics != "vicuna-7b" and not self.normalize_projector:
            found.append(
                f"normalize_statistics: found {self.normalize_statistics!r} without normalize_projector, so it has no effect; "
                "add normalize_projector: true or leave it out"
            )
        resolved = (self.projector_max_norm, self.projector_scale)
        if (resolved[0] is None) != (resolved[1] is None):
            found.append(
                f"projector_max_norm, projector_scale: found {resolved}; give both or, better, use normalize_statistics"
            )
        elif any(number is not None and not (number > 0 and math.isfinite(number)) for number in resolved):
            found.append(
                f"projector_max_norm, projector_scale: found {resolved}; both must be positive numbers"
            )
        return found

    def _multilayer_problems(self, num_tower_layers: int | None) -> list[str]:
        layers = self.multilayer_layers
        if not self.use_multilayer_features:
            if layers == DEFAULT_LAYERS:
                return []
            return [
                f"multilayer_layers: found {list(layers)} without use_multilayer_features, so it has no effect; "
                "add use_multilayer_features: true or leave it out"
            ]
        top = (
            num_tower_layers
            if num_tower_layers is not None
            else max([1, *(layer for layer in layers if _is_int(layer))])
        )
        if (
            not layers
            or any(not _is_int(layer) or not 1 <= layer <= top for layer in layers)
            or len(set(layers)) != len(layers)
        ):
            bound = (
                f"1 to {num_tower_layers} (the tower's layers)"
                if num_tower_layers is not None
                else "1 upwards"
            )
            return [
                f"multilayer_layers: found {list(layers)}; allowed are one or more different layers from {bound}; choose among them"
            ]
        return []

    def _compression_problems(self, grid_side: int | None) -> list[str]:
        size = self.final_spatial_size
        if not self.compression_after_projection:
            if size is None:
                return []
            return [
                f"final_spatial_size: found {size} without compression_after_projection, so it has no effect; "
                "add compression_after_projection: true or leave it out"
            ]
        if size is None:
            return [
                "final_spatial_size: missing; compression_after_projection needs it; give the number of tokens, e.g. 16 for 4x4"
            ]
        if not _is_int(size) or size < 1:
            return [
                f"final_spatial_size: found {size!r}; allowed are positive whole numbers, e.g. 16 for 4x4"
            ]
        return [] if self.published_behaviour else self._square_problems(size, grid_side)

    def _square_problems(self, size: int, grid_side: int | None) -> list[str]:
        root = math.isqrt(size)
        if root * root != size:
            allowed = f"{root * root} or {(root + 1) ** 2}"
            if grid_side is not None:
                allowed = f"one of {_squares(grid_side)}"
            return [
                f"final_spatial_size: found {size}, which is no square number (it counts tokens: 16 means 4x4); use {allowed}"
            ]
        if grid_side is not None and grid_side % root:
            return [
                f"final_spatial_size: found {size} = {root}x{root}, but {root} does not divide the vision tower's grid side "
                f"{grid_side}; use one of {_squares(grid_side)}"
            ]
        return []

    def _interleave_problems(self, grid_side: int | None) -> list[str]:
        sparsity = self.interleave_sparsity
        if not self.interleave:
            if sparsity is None:
                return []
            return [
                f"interleave_sparsity: found {sparsity} without interleave, so it has no effect; add interleave: true or leave it out"
            ]
        if sparsity is not None and (not _is_int(sparsity) or sparsity < 1):
            return [f"interleave_sparsity: found {sparsity!r}; allowed are whole numbers from 1"]
        tokens = self._token_count(grid_side)
        if tokens is not None and self.sparsity > tokens:
            return [
                f"interleave_sparsity: {self.sparsity} vision tokens between coordinates, but an image has only {tokens}, so interleave "
                f"has no effect; use interleave_sparsity of at most {tokens} or turn interleave off"
            ]
        return []

    def _published_problems(self) -> list[str]:
        if not self.published_behaviour:
            return []
        if self.is_vanilla:
            return ["published_behaviour: has no effect without an intervention; leave it out"]
        return [
            f"{first} with {second}: the published code fails with both; set published_behaviour: false, where they work together"
            for first, second in PUBLISHED_CONFLICTS
            if getattr(self, first) and getattr(self, second)
        ]

    def _token_count(self, grid_side: int | None) -> int | None:
        """Tokens per image where that is known; None when it depends on an unknown grid or on a bad size."""
        size = self.final_spatial_size
        if self.compression_after_projection:
            return self.final_side(0) ** 2 if size is not None and _is_int(size) and size > 0 else None
        return None if grid_side is None else grid_side**2

    def _single_token(self, grid_side: int | None) -> bool:
        return self._token_count(grid_side) == 1


FLAGS = (
    "normalize_projector",
    "use_multilayer_features",
    "compression_after_projection",
    "twoD_vision_embedding",
    "interleave",
    "add_spatial_coordinates",
)
GRID_FLAGS = (
    "compression_after_projection",
    "twoD_vision_embedding",
    "interleave",
    "add_spatial_coordinates",
)
FIELD_NAMES = tuple(item.name for item in dataclasses.fields(Interventions))
# Pairs that raise in the published code (shape errors, a missing tokenizer).
PUBLISHED_CONFLICTS = (
    ("add_spatial_coordinates", "use_multilayer_features"),
    ("add_spatial_coordinates", "compression_after_projection"),
    ("twoD_vision_embedding", "interleave"),
)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _squares(grid_side: int) -> str:
    return ", ".join(str(side * side) for side in range(1, grid_side + 1) if grid_side % side == 0)


def _two_positive_numbers(text: str) -> tuple[float, float] | None:
    """`MAX_NORM,SCALE` as numbers, or None when the text is something else."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    if len(numbers) != 2 or not all(number > 0 and math.isfinite(number) for number in numbers):
        return None
    return numbers[0], numbers[1]
