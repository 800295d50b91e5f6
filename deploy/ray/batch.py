"""Detects in a folder or object store of pictures on a Ray cluster, and goes on where it was broken off.

    python -m deploy.ray.batch --input pictures/ --output found/
    python -m deploy.ray.batch --input s3://bucket/pictures --output s3://bucket/found --bundle /bundles/r50 --engines 8
    python -m deploy.ray.batch --input pictures/ --output found/ --format coco

All pictures below the input are listed once and cut into shards (pictures.parquet, run.json). The results of a shard
are one file, shards/part-NNNNNN.parquet, which appears whole or not at all. What is done is known from these files: the
same command again does what is missing, whatever ended it. CPUs decode and resize; one batch of a canvas after the
other goes to the engines, one a GPU. A picture that cannot be read has a row that says why; one that could not be
fetched, or with which an engine was lost, is tried again with its shard. Without --address (or RAY_ADDRESS) Ray is
started on this host.
"""

import argparse
import logging
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError, RayTaskError

from bundle import Bundle, BundleError, read_bundle
from deploy.ray.decode import Decode
from deploy.ray.infer import Infer
from deploy.ray.plan import Plan, PlanMismatch, Shard, open_plan
from deploy.ray.results import Gather, read_rows, write_coco
from deploy.ray.storage import Store
from server.errors import BadParameter
from server.options import DetectOptions, category_ids, parse_options
from server.settings import Settings

COCO = "coco.json"
TRIES = 3
WAVE = 1000
"""Shards handed to Ray at once: their lists of paths are in memory."""
DECODE_BYTES = 512 << 20
"""What a decoder may take: a batch for each canvas, pictures fetched ahead, and one large one."""
_SAY_EVERY_S = 5.0


def run(args: argparse.Namespace, settings: Settings, options: DetectOptions, bundle: Bundle) -> int:
    """Write what is missing; 0 if nothing is missing then, else 1."""
    source, output = Store(args.input), Store(args.output)
    plan = open_plan(source, output, asked(args, settings, options, bundle), args.shard_images)
    pending = plan.pending(output)
    print(f"{len(plan.paths)} pictures in {len(plan)} shards, {len(plan) - len(pending)} of them written", flush=True)
    started_s, done, total = time.monotonic(), 0, sum(len(shard.paths) for shard in pending)
    failed: dict[int, str] = {}
    for _ in range(TRIES):
        if not pending:
            break
        failed = {}
        said_s = 0.0
        for wave in range(0, len(pending), WAVE):
            shards = pending[wave : wave + WAVE]
            try:
                for shard in written(dataset(args, source, settings, options, bundle, shards), output, shards, failed):
                    done += len(shard.paths)
                    now_s = time.monotonic()
                    if now_s - said_s > _SAY_EVERY_S or done == total:
                        said_s = now_s
                        rate = done / (now_s - started_s)
                        print(
                            f"{done} of {total} pictures, {rate:.1f}/s, {(total - done) / rate:.0f} s left", flush=True
                        )
            except RayTaskError as error:  # no loss of a worker: it would come again
                print(f"a worker cannot go on: {error.cause!r}", file=sys.stderr)
                return 1
            except (RayError, ExecutionTimeoutError) as error:
                print(f"broken off: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        pending = plan.pending(output)
    if pending:
        for shard in pending[:10]:
            why = failed.get(shard.number, "its workers were lost or did not get on")
            print(f"shard {shard.number} is not done after {TRIES} tries: {why}", file=sys.stderr)
        print(f"{len(pending)} of {len(plan)} shards are missing; the same command tries them again", file=sys.stderr)
        return 1
    return summary(args, output, plan, bundle)


def asked(args: argparse.Namespace, settings: Settings, options: DetectOptions, bundle: Bundle) -> dict[str, Any]:
    """What the results depend on, for the plan."""
    manifest = bundle.manifest
    return {
        "input": args.input,
        "model": f"{manifest.model.name} {manifest.model.version}",
        "onnx_sha256": manifest.hashes["onnx"],
        "engine": settings.engine,
        "precision": settings.precision,
        "threshold": options.threshold,
        "max_detections": options.max_detections,
        "classes": options.classes,
    }


def dataset(
    args: argparse.Namespace,
    source: Store,
    settings: Settings,
    options: DetectOptions,
    bundle: Bundle,
    shards: Sequence[Shard],
) -> Dataset:
    """The stages over these shards; nothing runs before its results are asked for."""
    rows = [{"number": shard.number, "first": shard.first, "paths": list(shard.paths)} for shard in shards]
    decode = Decode(source, bundle.manifest, settings.max_batch_size, settings.max_image_pixels)
    # Memory is asked for by one of them only. Ray Data would run stages that ask for the same in one process, and
    # decoding would wait for engines.
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            decode.batches_of,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=args.decode_cpus,
            memory=DECODE_BYTES,
        )
        .map_batches(
            Infer,
            fn_constructor_args=(settings, options),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=args.engines),
            num_cpus=args.engine_cpus,
            num_gpus=args.engine_gpus or None,
        )
    )


def written(data: Dataset, output: Store, shards: Sequence[Shard], failed: dict[int, str]) -> Iterator[Shard]:
    """Each shard as its file appears; of those that get none, the reason goes into `failed`."""
    gather = Gather(output, shards)
    try:
        for results in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from gather.take(results)
    finally:
        failed.update(gather.failed)


def summary(args: argparse.Namespace, output: Store, plan: Plan, bundle: Bundle) -> int:
    """Count what is written, picture by picture, and write the COCO file if it is asked for."""
    answered = rows = 0
    errors: dict[str, int] = {}
    for rows, row in enumerate(read_rows(output, plan), 1):
        if row["image_id"] != rows - 1 or row["path"] != plan.paths[rows - 1]:
            print(f"{output}: the row of picture {rows - 1} is that of {row['path']}: damaged", file=sys.stderr)
            return 1
        if row["error_code"] is None:
            answered += 1
        else:
            errors[row["error_code"]] = errors.get(row["error_code"], 0) + 1
    if args.format == "coco":
        with tempfile.TemporaryFile() as file:
            write_coco(file, output, plan, bundle.manifest)
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                output.write(COCO, content)
    said = "".join(f", {count} {code}" for code, count in sorted(errors.items()))
    print(f"all {rows} pictures are written, each once: {answered} answered{said}", flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m deploy.ray.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--input", required=True, metavar="URI", help="folder, or s3://, gs://, abfs://, hdfs:// URI")
    made.add_argument("--output", required=True, metavar="URI", help="where results are written, and looked for")
    made.add_argument("--format", choices=("parquet", "coco"), default="parquet", help="coco: coco.json, too")
    made.add_argument("--bundle", type=Path, metavar="PATH", help="the same folder on every host (default: embedded)")
    made.add_argument("--threshold", default="0.05", help="least score of a detection (default: 0.05)")
    made.add_argument("--max-detections", default="100", help="most detections of a picture (default: 100)")
    made.add_argument("--classes", help="comma-separated names or ids (default: all)")
    made.add_argument(
        "--shard-images", type=positive, default=1000, metavar="N", help="pictures a file (default: 1000)"
    )
    made.add_argument("--address", help="of the cluster; auto: the one this host belongs to")
    made.add_argument("--engines", type=positive, metavar="N", help="default: the cluster's GPUs, else half its CPUs")
    made.add_argument(
        "--engine-gpus", type=float, metavar="X", help="GPUs of an engine (default: 1 where there are any)"
    )
    made.add_argument("--engine-cpus", type=float, default=1.0, metavar="X", help="CPUs of an engine (default: 1)")
    made.add_argument("--decode-cpus", type=float, default=1.0, metavar="X", help="CPUs of a decoder (default: 1)")
    made.add_argument(
        "--patience", type=positive, default=600, metavar="S", help="seconds without progress that end a try (600)"
    )
    return made


def positive(text: str) -> int:
    """At least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def read_options(args: argparse.Namespace) -> DetectOptions:
    """Of POST /detect, by its rules. Raises BadParameter."""
    given = {"threshold": args.threshold, "max_detections": args.max_detections, "classes": args.classes}
    return parse_options((name, value) for name, value in given.items() if value is not None)


def connect(args: argparse.Namespace) -> None:
    """Join the cluster, or start one here; see what it has."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = args.address or os.environ.get("RAY_ADDRESS")
    here = {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
    there = ray.cluster_resources()
    if args.engine_gpus is None:
        args.engine_gpus = 1.0 if there.get("GPU") else 0.0
    if args.engines is None:
        args.engines = max(1, int(there.get("GPU", 0) / args.engine_gpus if args.engine_gpus else there["CPU"] / 2))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A lost worker's work is tried again for ever, by Ray; a picture that ends each of them must not hold a run up.
    context.execution_no_progress_timeout_s = args.patience
    context.raise_original_map_exception = True  # a bundle that no engine takes is said as it is
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or go on."""
    command = parser()
    args = command.parse_args(argv)
    try:
        options = read_options(args)
        settings = Settings() if args.bundle is None else Settings(bundle=args.bundle)
        bundle = read_bundle(settings.bundle)
        category_ids(options.classes, bundle.manifest.categories)
        connect(args)
        return run(args, settings, options, bundle)
    except (BadParameter, ValidationError) as error:
        command.error(str(error))
    except (BundleError, PlanMismatch, ConnectionError, OSError, ValueError) as error:
        print(f"{command.prog}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
