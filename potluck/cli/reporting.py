"""Results of `bench` as a table, JSON, JSON lines, CSV or Markdown.

Names, order and types of the fields are llama-bench's (tools/llama-bench, of which llama-cpp-python
0.3.36 brings the source), so that scripts which read the one read the other.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterable

from potluck import __version__
from potluck.cli import quantities, terminal
from potluck.cli.measuring import CHUNK_ROWS, Measured, Subject, deviation

# What llama-bench can set and this engine can not, as it stands in its results on a CPU alone.
_FIXED: dict[str, object] = {
    "gpu_info": "",
    "backends": "CPU",
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 0,
    "n_gpu_layers": 0,
    "n_cpu_moe": 0,
    "split_mode": "none",
    "main_gpu": 0,
    "no_kv_offload": False,
    "flash_attn": 1,  # the only attention here: softmax while reading the KV, scores never stored
    "devices": "none",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "load_mode": "none",  # read into memory of our own
    "lazy_mode": "off",
    "embeddings": False,
    "no_op_offload": 0,
    "no_host": False,
    "repack": True,
    "fit_target": 0,
    "fit_min_ctx": 0,
}
_FIELDS = (
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename"),
    *("model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "cpu_mask"),
    *("cpu_strict", "poll", "type_k", "type_v", "n_gpu_layers", "n_cpu_moe", "split_mode"),
    *("main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split"),
    *("tensor_buft_overrides", "load_mode", "lazy_mode", "embeddings", "no_op_offload", "no_host"),
    *("repack", "fit_target", "fit_min_ctx", "n_prompt", "n_gen", "n_depth", "test_time"),
    *("avg_ns", "stddev_ns", "avg_ts", "stddev_ts"),
)
_SAMPLES = ("samples_ns", "samples_ts")  # not in CSV, as there
_OURS = (
    *("n_sessions", "isa", "read_bandwidth", "gb_per_second", "gmac_per_second"),
    *("n_layers", "model_n_layers"),  # measured, and of the whole model
)


def fields_of(subject: Subject, m: Measured, cpu: str) -> dict[str, object]:
    """One result, all fields. n_batch and n_ubatch are the rows of its largest step."""
    test, rates = m.test, m.tokens_per_second
    samples_ns = [round(s * 1e9) for s in m.seconds]
    rows_a_step = max(min(CHUNK_ROWS, test.n_prompt), test.n_sessions if test.n_gen else 0)
    found: dict[str, object] = {
        **_FIXED,
        "build_commit": f"potluck-{__version__}",
        "build_number": 0,
        "cpu_info": cpu,
        "model_filename": str(subject.path),
        "model_type": subject.type_name,
        "model_size": subject.size_bytes,
        "model_n_params": subject.n_params,
        "n_batch": rows_a_step,
        "n_ubatch": rows_a_step,
        "n_threads": m.n_threads,
        "type_k": subject.kv_type.value,
        "type_v": subject.kv_type.value,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": m.started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.mean(samples_ns)),
        "stddev_ns": round(deviation(samples_ns)),
        "avg_ts": statistics.mean(rates),
        "stddev_ts": deviation(rates),
        "samples_ns": samples_ns,
        "samples_ts": rates,
        "n_sessions": test.n_sessions,
        "isa": m.isa,
        "read_bandwidth": m.read_bandwidth,
        "gb_per_second": m.gb_per_second(subject),
        "gmac_per_second": m.gmac_per_second(subject),
        "n_layers": subject.config.n_layers,
        "model_n_layers": subject.whole.n_layers,
    }
    return {name: found[name] for name in (*_FIELDS, *_SAMPLES, *_OURS)}


def write(style: str, subject: Subject, measured: Iterable[Measured], cpu: str) -> None:
    """Results on stdout, one of STYLES; each as it comes, where the format allows that."""
    STYLES[style](subject, measured, cpu)


def _write_table(subject: Subject, measured: Iterable[Measured], cpu: str) -> None:
    columns = ("model", "isa", "threads", "test", "tokens/s", "+-", "GB/s", "of memory", "GMAC/s")
    rows: list[tuple[str, ...]] = []
    best = 0.0
    for m in measured:
        best = max(best, m.read_bandwidth)
        read = m.gb_per_second(subject)
        rows.append(
            (
                *_what(subject, m),
                f"{statistics.mean(m.tokens_per_second):.2f}",
                f"{deviation(m.tokens_per_second):.2f}",
                "" if read is None else f"{read:.1f}",
                "" if read is None else f"{read * 1e9 / m.read_bandwidth:.0%}",
                f"{m.gmac_per_second(subject):.1f}",
            )
        )
    title = f"Memory reads {quantities.size(best)}/s on {cpu}, KV {subject.kv_type.value}"
    right = frozenset((columns[2], *columns[4:]))
    terminal.print_tables([terminal.Table(columns, tuple(rows), right, title)])


def _write_markdown(subject: Subject, measured: Iterable[Measured], cpu: str) -> None:
    print("| model | isa | threads | test | t/s |\n|---|---|---:|---:|---:|")
    for m in measured:
        rates = m.tokens_per_second
        rate = f"{statistics.mean(rates):.2f} ± {deviation(rates):.2f}"
        print(f"| {' | '.join((*_what(subject, m), rate))} |", flush=True)
    print(f"\n{cpu}, KV {subject.kv_type.value}, potluck {__version__}")


def _write_json(subject: Subject, measured: Iterable[Measured], cpu: str) -> None:
    print(json.dumps([fields_of(subject, m, cpu) for m in measured]))


def _write_json_lines(subject: Subject, measured: Iterable[Measured], cpu: str) -> None:
    for m in measured:
        print(json.dumps(fields_of(subject, m, cpu)), flush=True)


def _write_csv(subject: Subject, measured: Iterable[Measured], cpu: str) -> None:
    names = (*_FIELDS, *_OURS)
    print(",".join(names))
    lines = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for m in measured:
        fields = fields_of(subject, m, cpu)
        values = (fields[name] for name in names)
        # 0 and 1 for no and yes, as there.
        lines.writerow([int(v) if isinstance(v, bool) else v for v in values])
        sys.stdout.flush()


def _what(subject: Subject, m: Measured) -> tuple[str, ...]:
    return subject.type_name, m.isa, str(m.n_threads), m.test.name


STYLES: dict[str, Callable[[Subject, Iterable[Measured], str], None]] = {
    "table": _write_table,
    "md": _write_markdown,
    "json": _write_json,
    "jsonl": _write_json_lines,
    "csv": _write_csv,
}
