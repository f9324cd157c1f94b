"""The index of a mixture: one row a record, one row an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workflow_scripts.io import UserError
from workflow_scripts.merge.joins import Store
from workflow_scripts.merge.parts import MergedPart, label_of_records
from workflow_scripts.merge.writing import empty_images, empty_records


class Tables:
    """Fills `records.npy` (but for the places in samples.json) and `images.npy`."""

    def __init__(self, parts: Sequence[MergedPart], stores: list[Store], total: int) -> None:
        self.stores = stores
        self.sources = list(dict.fromkeys(name for part in parts for name in part.names))
        self.mappings: list[dict[str, str]] = []
        self.records = empty_records(total)
        images, at = [], 0
        for part in parts:
            rows = slice(at, at + len(part.chosen))
            images.append(self._images(part))
            self._records(part, rows, sum(len(block) for block in images[:-1]))
            at += len(part.chosen)
        self.images = np.concatenate(images) if images else empty_images(0)
        self._keep_used_sources()

    def _records(self, part: MergedPart, rows: slice, first: int) -> None:

        source_of_label = np.array([self.sources.index(name) for name in part.names], np.uint16)
        table = self.records[rows]
        table["words"] = part.records.words[part.chosen]
        table["source"] = source_of_label[label_of_records(part)[part.chosen]]
        counts = part.records.n_images[part.chosen]
        table["n_images"] = counts
        table["first_image"] = first + np.cumsum(counts) - counts

    def _images(self, part: MergedPart) -> np.ndarray:
        records, join = part.records, part.join
        counts = records.n_images[part.chosen]
        # The image numbers of the chosen records, one after the other.
        ends = np.cumsum(counts)
        numbers = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            records.first_image[part.chosen] - (ends - counts), counts
        )
        rows = empty_images(len(numbers))
        offset_of_mapping = len(self.mappings)
        self.mappings += [{"prefix": r.prefix, "source": r.source, "root": r.root} for r in join.resolved]
        place = {store.source: index for index, store in enumerate(self.stores)}
        for index, resolved in enumerate(join.resolved):
            mine = np.flatnonzero(join.mapping[numbers] == index)
            if len(mine):
                store = self.stores[place[resolved.source]]
                self._fill(rows, mine, store, join.row[numbers[mine]], offset_of_mapping + index)
                rows["store"][mine] = place[resolved.source]
        rows["tolerant"] = np.isin(join.status[numbers].astype(str), ("truncated", "corrupt"))
        return rows

    def _fill(
        self, rows: np.ndarray, mine: np.ndarray, store: Store, table_rows: np.ndarray, mapping: int
    ) -> None:
        table = store.table.select(["offset", "stored_size", "size", "method", "crc32"]).take(table_rows)
        for column in ("stored_size", "size", "method", "crc32"):
            values = table.column(column).to_numpy()
            if len(values) and values.max() > 0xFFFFFFFF:
                raise UserError(f"{store.path}: an image of {values.max()} bytes is too large for the index")
            rows[column][mine] = values
        # In a folder an image is found by its name; the row says which mapping makes the name.
        rows["offset"][mine] = mapping if store.type == "folder" else table.column("offset").to_numpy()

    def _keep_used_sources(self) -> None:
        """Sources without a record are not named."""
        used = np.unique(self.records["source"])
        number = np.zeros(len(self.sources), np.uint16)
        number[used] = np.arange(len(used))
        self.records["source"] = number[self.records["source"]]
        self.sources = [self.sources[index] for index in used]

    def counts(self) -> dict[str, dict[str, Any]]:
        """Records, text-only records, images and words by source."""
        found = {}
        for index, name in enumerate(self.sources):
            mine = self.records[self.records["source"] == index]
            found[name] = {
                "records": len(mine),
                "text_only": int(np.sum(mine["n_images"] == 0)),
                "images": int(mine["n_images"].sum()),
                "words": int(np.abs(mine["words"].astype(np.int64)).sum()),
            }
        return found
