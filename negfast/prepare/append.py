"""A day of events added to a prepared data set; nothing that was written before is written again."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from safetensors.numpy import save_file

from negfast.data.dataset import EVENTS, MANIFEST, USERS, VALUES, Dataset, date_of, file_record
from negfast.data.shards import write_part
from negfast.errors import InputError
from negfast.files import atomic_file, locked
from negfast.prepare.events import Events


def append_events(
    path: str | os.PathLike[str], events: Events, source: dict[str, Any] | None = None, threads: int = 1
) -> Dataset:
    """Adds later events to the data set at ``path`` as a part of its own and returns the data set opened anew.

    ``events`` are what ``read_events(files, mapping, report, known=data.items.ids, whole=False)`` gives, with the
    mapping that the manifest tells. Their users are matched by id: those that the data set does not know get the next
    indices. Items, semantic IDs and the dates of the split stay, so the events extend the test part. ``source`` is
    what the manifest is to say of where they come from, e.g. ``{"name": ..., **file_record(file)}``.

    Files are only added: ``events.nfs.000001`` and, where needed, ``users.parquet.000001`` and
    ``values.safetensors.000001``; then the manifest is replaced by a rename. A process that dies before that leaves
    the old data set, and what it had written is overwritten by the next append. Open data sets stay valid, and runs of
    the old data set take the new one.

    Raises InputError, and changes nothing, for events before the last one of their user in the data set, for other
    items, for values where the data set has none or none where it has some, and while another process writes there.
    """
    path = Path(path)
    with locked(path):
        data = Dataset.open(path)
        data.refuse_communities()
        manifest, log = data.manifest, events.log
        if events.item_ids != data.items.ids:
            raise InputError(f"{path}: found events on other items, expected the {len(data.items.ids)} of {MANIFEST}")
        if (log.value is not None) != (VALUES in manifest["files"]):
            found, expected = ("values", "none") if log.value is not None else ("no values", "some")
            raise InputError(f"{path}: found {found} in the events to append, expected {expected} as in the data set")
        of_id = {user_id: user for user, user_id in enumerate(data.user_ids)}
        new_ids = [user_id for user_id in events.user_ids if user_id not in of_id]
        of_id |= {user_id: user for user, user_id in enumerate(new_ids, start=len(of_id))}
        index = np.array([of_id[user_id] for user_id in events.user_ids], np.int32)
        user = index[log.user]
        order = np.argsort(user, kind="stable")  # the order in which a part holds them
        number = len(data.parts) + 1
        names = {name: f"{name}.{number:06d}" for name in (EVENTS, USERS, VALUES)}

        columns = user[order], log.item[order], log.feedback[order], log.time[order]
        write_part(path / names[EVENTS], data.shard, *columns, len(of_id), log.n_items, threads)
        written = [names[EVENTS]]
        if new_ids:
            with atomic_file(path / names[USERS]) as temporary:
                parquet.write_table(pa.table({"id": pa.array(new_ids, pa.string())}), temporary, compression="zstd")
            written.append(names[USERS])
        if log.value is not None:
            with atomic_file(path / names[VALUES]) as temporary:
                save_file({"value": log.value[order]}, temporary)
            written.append(names[VALUES])

        days = {"first": date_of(log.day.min()), "last": date_of(log.day.max())}
        counts = dict(manifest["counts"])
        counts |= {name: counts.get(name, 0) + more for name, more in log.feedback_counts().items()}
        counts |= {"users": len(of_id), "events": counts["events"] + len(log)}
        whole = manifest["days"]
        part = {"files": written, "events": len(log), "new_users": len(new_ids), "days": days, "source": source}
        data.replace_manifest(
            {
                **manifest,
                "counts": counts,
                "days": {"first": min(whole["first"], days["first"]), "last": max(whole["last"], days["last"])},
                "files": manifest["files"] | {name: file_record(path / name) for name in written},
                "parts": [*data.parts, part],
                "extends": [*data.extends, data.fingerprint],
            }
        )
        return Dataset.open(path)
