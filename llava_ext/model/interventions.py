"""The opt-in interventions: what each flag is, which values it may have, which flags go together.

Plain standard library: the workflow's config schema, the training command line and the model's configuration
are all made from :class:`Interventions`, and the file is copied beside exported checkpoints. With every field
at its default the model is vanilla LLaVA. What a field is to the others (whose value it is, its word in
folder names, ...) is its :class:`Role`: a new field needs no entry in any other list.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .poolings import DEFAULT_POOLING, POOLINGS

# The published code's constants, measured on Vicuna-7B: clip the norm of each token at MAX_NORM, then scale
# by SCALE.
VICUNA_7B_MAX_NORM = 1.22
VICUNA_7B_SCALE = 0.83
DEFAULT_LAYERS = (12, 16, 20, 24)
DEFAULT_SPARSITY = 4
PUBLISHED_GRID_SIDE = 24
PUBLISHED_SPARSITY = 4
NAMED_STATISTICS = ("vicuna-7b", "auto")


class InterventionError(ValueError):
    """Interventions that cannot work; the message names key, value, what is allowed and the fix."""


@dataclass(frozen=True)
class Role:
    """What a field of :class:`Interventions` is to the others. All that treats fields alike derives from it.

    Attributes:
        flag: the flag without which the value has no effect; None for the flags themselves and for the
            switch.
        is_flag: it is an intervention; off by default.
        needs_grid: a flag that works on a square grid of patches only.
        short: its word in the names of run folders, `{}` standing for the value; None: it has none.
        allowed: the register of its values, where they are names.
        means: its value as the model uses it, where that is not the one that was written.
        in_sequence: the tokens that stand for a picture depend on it.
        is_recent: records of checkpoints and trainings leave it out at its default, so that they equal those
            from before the field existed.
    """

    flag: str | None = None
    is_flag: bool = False
    needs_grid: bool = False
    short: str | None = None
    allowed: Mapping[str, Any] | None = None
    means: Callable[[Interventions], Any] | None = None
    in_sequence: bool = False
    is_recent: bool = False


def _flag(short: str, doc: str, **role: Any) -> Any:
    """A field that is an intervention."""
    return _value(False, doc, is_flag=True, short=short, **role)


def _value(default: Any, doc: str, **role: Any) -> Any:
    """A field with its :class:`Role`; the doc is the command line's help and the schema's description
    (which pydantic reads).
    """
    return field(default=default, metadata={"description": doc, "role": Role(**role)})


@dataclass(frozen=True)
class Interventions:
    """The flags of one experiment. Immutable and hashable; ``validate`` before use."""

    # pydantic reads this when the class is a field of a configuration section
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    normalize_projector: bool = _flag(
        "normalize",
        "Normalise each projected vision token: RMS norm with a learned weight, then clip its Euclidean norm"
        " at projector_max_norm and multiply by projector_scale, so that vision tokens are as long as text"
        " tokens.",
    )
    normalize_statistics: str = _value(
        "vicuna-7b",
        "Where the two numbers of normalize_projector come from: `vicuna-7b` (the published constants 1.22"
        " and 0.83), `auto` (measured: the mean norm of the LLM's own token embeddings), or two numbers"
        " `MAX_NORM,SCALE`.",
        flag="normalize_projector",
        means=lambda chosen: None,  # nothing but the two numbers
    )
    projector_max_norm: float | None = _value(
        None,
        "The resolved clip of normalize_projector. Filled in from normalize_statistics and saved; leave it"
        " out.",
        flag="normalize_projector",
        means=lambda chosen: (chosen.fixed_statistics() or (None, None))[0],
    )
    projector_scale: float | None = _value(
        None,
        "The resolved factor of normalize_projector. Filled in from normalize_statistics and saved; leave it"
        " out.",
        flag="normalize_projector",
        means=lambda chosen: (chosen.fixed_statistics() or (None, None))[1],
    )
    use_multilayer_features: bool = _flag(
        "multilayer",
        "Feed the projector the patches of several vision layers, each after the tower's final layer norm, "
        "concatenated on the channels, instead of one layer's.",
    )
    multilayer_layers: tuple[int, ...] = _value(
        DEFAULT_LAYERS,
        "Vision layers for use_multilayer_features, counted from 1 (first layer's output) to the number of"
        " layers.",
        flag="use_multilayer_features",
        means=lambda chosen: list(chosen.multilayer_layers),
    )
    compression_after_projection: bool = _flag(
        "compress",
        "Pool the projected patch grid down to final_spatial_size tokens.",
        needs_grid=True,
        in_sequence=True,
    )
    final_spatial_size: int | None = _value(
        None,
        "Number of vision tokens after compression_after_projection: the square of a divisor of the tower's"
        " grid side (24 for CLIP-L/336: 1, 4, 9, 16, 36, 64, 144 or 576).",
        flag="compression_after_projection",
        short="{}",
        in_sequence=True,
    )
    pooling: str = _value(
        DEFAULT_POOLING,
        "How compression_after_projection makes one token of several: "
        + ", ".join(f"`{name}` ({entry.doc})" for name, entry in POOLINGS.items())
        + ".",
        flag="compression_after_projection",
        short="{}",
        allowed=POOLINGS,
        is_recent=True,
    )
    twoD_vision_embedding: bool = _flag(
        "2d",
        "Rotary positions in two dimensions for vision tokens: half of the rotary frequencies turn by the"
        " row, half by the column.",
        needs_grid=True,
    )
    interleave: bool = _flag(
        "interleave",
        "Write the coordinates `row,column` as text tokens after every interleave_sparsity-th vision token.",
        needs_grid=True,
        in_sequence=True,
    )
    interleave_sparsity: int | None = _value(
        None,
        "Coordinates follow every this many vision tokens (4 if left out). Only with interleave.",
        flag="interleave",
        means=lambda chosen: chosen.sparsity,
        in_sequence=True,
    )
    add_spatial_coordinates: bool = _flag(
        "coordinates",
        "Append each patch's x and y in [-1, 1] as two channels to the vision features before the projector.",
        needs_grid=True,
    )
    published_behaviour: bool = _value(
        False,
        "Do what the authors' published code does where it differs from its description, for checkpoints"
        " trained with it: final_spatial_size is the side, coordinates count on a grid of 24 and follow every"
        " 4th token whatever interleave_sparsity says, twoD_vision_embedding shares one table per batch. See"
        " docs/interventions.md.",
        short="published_behaviour",
        means=lambda chosen: chosen.published_behaviour and not chosen.is_vanilla,
        in_sequence=True,
    )

    def __post_init__(self) -> None:
        # YAML gives lists and numbers where JSON, the command line and the dataclass have tuples and text.
        layers: Any = self.multilayer_layers
        if isinstance(layers, list):
            object.__setattr__(self, "multilayer_layers", tuple(layers))
        statistics: Any = self.normalize_statistics
        if isinstance(statistics, (list, tuple)):
            object.__setattr__(self, "normalize_statistics", ",".join(f"{number:g}" for number in statistics))

    # -- construction --------------------------------------------------------------------------------------

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
        """The fields as JSON values; recent ones only where they are not at their default."""
        values = {name: getattr(self, name) for name in FIELD_NAMES if not self._is_left_out(name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _is_left_out(self, name: str) -> bool:
        return ROLES[name].is_recent and getattr(self, name) == DEFAULTS[name]

    # -- meaning -------------------------------------------------------------------------------------------

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
        """(row, column) that interleave writes after vision token ``index`` (0-based) of a grid with this
        side.
        """
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
        """One line for each field in which ``other`` would give a different model: `key: mine against
        other's`.
        """
        mine, others = self._meaning(), other._meaning()
        return [
            f"{key}: {mine[key]!r} against {others[key]!r}" for key in FIELD_NAMES if mine[key] != others[key]
        ]

    def in_sequence(self) -> dict[str, Any]:
        """The values on which the tokens depend that stand for a picture, where they are not vanilla's.

        Where they are equal, so is every sequence, with the same tower.
        """
        return {name: value for name, value in self._meaning().items() if ROLES[name].in_sequence and value}

    def _meaning(self) -> dict[str, Any]:
        """What each field does to the model. Values of flags that are off do nothing: None, or a recent
        field's default.
        """
        values = {name: DEFAULTS[name] if role.is_recent else None for name, role in ROLES.items()}
        counting = {name: role for name, role in ROLES.items() if self._counts(role)}
        return values | {
            name: role.means(self) if role.means else getattr(self, name) for name, role in counting.items()
        }

    def _counts(self, role: Role) -> bool:
        return role.flag is None or bool(getattr(self, role.flag))

    # -- checks --------------------------------------------------------------------------------------------

    def problems(
        self, grid_side: int | None = None, num_tower_layers: int | None = None, keeps_cls: bool = False
    ) -> list[str]:
        """Every reason why these flags cannot work, as readable lines; empty when they can.

        Args:
            grid_side: patches along one side of the vision tower's grid; None checks only what does not need
                it.
            num_tower_layers: the vision tower's number of layers; None likewise.
            keeps_cls: the CLS token goes to the LLM too (`cls_patch`, transformers' `full`), so tokens are no
                grid.
        """
        found = self._problems_without_flag() + self._unknown_names()
        found += self._normalize_problems() + self._multilayer_problems(num_tower_layers)
        found += self._compression_problems(grid_side) + self._interleave_problems(grid_side)
        found += self._published_problems()
        if keeps_cls:
            found += [
                f"{name}: needs a grid of patches, but the CLS token is kept; use mm_vision_select_feature:"
                f" patch or turn {name} off"
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

    def _problems_without_flag(self) -> list[str]:
        """Values that do nothing because their flag is off."""
        return [
            f"{name}: found {_shown(getattr(self, name))} without {role.flag}, so it has no effect; "
            f"add {role.flag}: true or leave it out"
            for name, role in ROLES.items()
            if not self._counts(role) and getattr(self, name) != DEFAULTS[name]
        ]

    def _unknown_names(self) -> list[str]:
        """Names that are not in their register."""
        return [
            f"{name}: found {getattr(self, name)!r}; allowed are {', '.join(role.allowed)}; choose one of"
            " them"
            for name, role in ROLES.items()
            if role.allowed is not None and getattr(self, name) not in role.allowed
        ]

    def _statistics_problem(self) -> str:
        return (
            f"normalize_statistics: found {self.normalize_statistics!r}; allowed are `vicuna-7b`, `auto`, or"
            " two positive numbers `MAX_NORM,SCALE` such as `1.22,0.83`"
        )

    def _normalize_problems(self) -> list[str]:
        found = []
        if (
            self.normalize_statistics not in NAMED_STATISTICS
            and _two_positive_numbers(self.normalize_statistics) is None
        ):
            found.append(self._statistics_problem())
        resolved = (self.projector_max_norm, self.projector_scale)
        if (resolved[0] is None) != (resolved[1] is None):
            found.append(
                f"projector_max_norm, projector_scale: found {resolved}; give both or, better, use"
                " normalize_statistics"
            )
        elif any(number is not None and not (number > 0 and math.isfinite(number)) for number in resolved):
            found.append(
                f"projector_max_norm, projector_scale: found {resolved}; both must be positive numbers"
            )
        return found

    def _multilayer_problems(self, num_tower_layers: int | None) -> list[str]:
        layers = self.multilayer_layers
        if not self.use_multilayer_features:
            return []
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
                f"multilayer_layers: found {list(layers)}; allowed are one or more different layers from"
                f" {bound}; choose among them"
            ]
        return []

    def _compression_problems(self, grid_side: int | None) -> list[str]:
        size = self.final_spatial_size
        if not self.compression_after_projection:
            return []
        if size is None:
            return [
                "final_spatial_size: missing; compression_after_projection needs it; give the number of"
                " tokens, e.g. 16 for 4x4"
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
                f"final_spatial_size: found {size}, which is no square number (it counts tokens: 16 means"
                f" 4x4); use {allowed}"
            ]
        if grid_side is not None and grid_side % root:
            return [
                f"final_spatial_size: found {size} = {root}x{root}, but {root} does not divide the vision"
                f" tower's grid side {grid_side}; use one of {_squares(grid_side)}"
            ]
        return []

    def _interleave_problems(self, grid_side: int | None) -> list[str]:
        sparsity = self.interleave_sparsity
        if not self.interleave:
            return []
        if sparsity is not None and (not _is_int(sparsity) or sparsity < 1):
            return [f"interleave_sparsity: found {sparsity!r}; allowed are whole numbers from 1"]
        tokens = self._token_count(grid_side)
        if tokens is not None and self.sparsity > tokens:
            return [
                f"interleave_sparsity: {self.sparsity} vision tokens between coordinates, but an image has"
                f" only {tokens}, so interleave has no effect; use interleave_sparsity of at most {tokens} or"
                " turn interleave off"
            ]
        return []

    def _published_problems(self) -> list[str]:
        if not self.published_behaviour:
            return []
        if self.is_vanilla:
            return ["published_behaviour: has no effect without an intervention; leave it out"]
        found = []
        if self.pooling != DEFAULT_POOLING:
            found.append(
                f"pooling: found {self.pooling!r}, but the published code has only {DEFAULT_POOLING}; "
                "set published_behaviour: false"
            )
        return found + [
            f"{first} with {second}: the published code fails with both; set published_behaviour: false,"
            " where they work together"
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


ROLES: dict[str, Role] = {item.name: item.metadata["role"] for item in dataclasses.fields(Interventions)}
DEFAULTS: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(Interventions)}
FIELD_NAMES = tuple(ROLES)
FLAGS = tuple(name for name, role in ROLES.items() if role.is_flag)
GRID_FLAGS = tuple(name for name in FLAGS if ROLES[name].needs_grid)
# Pairs that raise in the published code (shape errors, a missing tokenizer).
PUBLISHED_CONFLICTS = (
    ("add_spatial_coordinates", "use_multilayer_features"),
    ("add_spatial_coordinates", "compression_after_projection"),
    ("twoD_vision_embedding", "interleave"),
)


def description(name: str) -> str:
    """A field's doc: the command line's help, the schema's description."""
    fields: dict[str, Any] = Interventions.__dataclass_fields__
    return str(fields[name].metadata["description"])


def name_words(values: Mapping[str, Any]) -> list[str]:
    """The words for a run folder's name: of the flags that are on first, then of values that differ from
    their default.
    """
    on = [key for key, value in values.items() if value is True]
    rest = [key for key, value in values.items() if not isinstance(value, bool)]
    return [
        short.format(values[key])
        for key in (*on, *rest)
        if (short := ROLES[key].short) and values[key] != DEFAULTS[key]
    ]


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


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
