"""bench_report.py FOLDER: of what the benchmark programs wrote there (*.json), prints the table and writes summary.json
and the plots (PNG, by gnuplot). Status 1: nothing was measured, or something failed."""

import json
import pathlib
import shutil
import subprocess
import sys

X_AXES = {  # of each plot: title, x label, whether x is logarithmic
    "RAM": ("A survey of anonymous memory, 128 touched extents of 1 MiB", "RAM [GiB]", True),
    "touched_extents": ("A survey of 64 GiB of anonymous memory, single pages touched", "touched extents", True),
    "touched_extents_of_memfd": ("A survey of a memfd of 64 GiB, single pages touched", "touched extents", True),
    "regions": ("A survey of regions of 1 GiB, 16 pages touched in each", "regions", True),
    "other_mappings": ("A survey of 1 GiB, 16 pages touched, beside other mappings", "other mappings", False),
    "vCPUs": ("vCPUs that ask at once, until all have their answer: 64 GiB, as after a boot", "vCPUs", False),
}


def read(folder):
    """The benchmarks by name, in the order in which they ran; empty files are of programs that had none to run."""
    found = {}
    for file in sorted(folder.glob("*_benches.json")):
        text = file.read_text()
        if text:
            for each in json.loads(text)["benchmarks"]:
                name = each["name"].removesuffix("/manual_time").removesuffix("/iterations:1")
                found[name] = each
    return found


def named(benchmarks, kind):
    return {name.removeprefix(kind): each for name, each in benchmarks.items() if name.startswith(kind)}


def time_of(nanoseconds):
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if nanoseconds >= size:
            value = nanoseconds / size
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{nanoseconds:.3g} ns"


def table_of(rows):
    """Lines of Markdown, and below it what was not measured."""
    lines = ["| what | ours | beside it | value | goal | met |", "| --- | --- | --- | --- | --- | --- |"]
    without = []
    for name, row in rows.items():
        if row.get("error_occurred"):
            without.append(f"{name}: {row['error_message']}")
            continue
        is_ratio = "floor" in row
        ours = time_of(row["ours"]) if is_ratio else ""
        beside = f"{row['label']}: {time_of(row['floor'])}" if is_ratio else row["label"]
        met = "yes" if row["value"] <= row["goal"] else "no"
        lines.append(f"| {name} | {ours} | {beside} | {row['value']:.4g} | {row['goal']:g} | {met} |")
    return lines, without


def summary_of(rows):
    return {
        name: {
            "value": row["value"],
            "goal": row["goal"],
            "unit": f"times the time of {row['label']}" if "floor" in row else row["label"],
        }
        for name, row in rows.items()
        if not row.get("error_occurred")
    }


def plot(folder, name, points, floor):
    title, x_label, is_logarithmic = X_AXES[name]
    data = folder / f"{name}.dat"
    lines = ["# x, ours [ms], floor [ms], ours [KiB], floor [KiB]"]
    for each in points:
        times = each["ours"] / 1e6, each["floor"] / 1e6
        rooms = each["ours_bytes"] / 1024, each["floor_bytes"] / 1024
        lines.append(" ".join(f"{number:.7g}" for number in (each["x"], *times, *rooms)))
    data.write_text("\n".join(lines) + "\n")
    xs = [each["x"] for each in points]
    room = (max(xs) - min(xs)) * 0.03 or 0.5
    x_range = f"[{min(xs) / 1.3:g}:{max(xs) * 1.3:g}]" if is_logarithmic else f"[{min(xs) - room:g}:{max(xs) + room:g}]"

    def y_range(*fields):
        """With room for the key above the lines."""
        values = [each[field] for each in points for field in fields if each[field] > 0]
        return min(values) / 2, max(values) * 12

    times, rooms = y_range("ours", "floor"), y_range("ours_bytes", "floor_bytes")
    script = f"""
set terminal pngcairo noenhanced size 1000,1000 font "Sans,12" linewidth 1.5
set output "{name}.png"
set multiplot layout 2,1 title "{title}" font ",14"
set grid
set key top left Left reverse
set lmargin 12
set rmargin 6
set xrange {x_range}
set xlabel "{x_label}"
set format y "%g"
set logscale y 10
{"set logscale x 10; set format x '%.0f'" if is_logarithmic else ""}
set ylabel "time [ms]"
set yrange [{times[0] / 1e6:g}:{times[1] / 1e6:g}]
plot "{data.name}" using 1:2 with linespoints pointtype 7 title "cppvmm", \\
     "" using 1:3 with linespoints pointtype 5 title "{floor}"
set ylabel "heap at most [KiB]"
set yrange [{rooms[0] / 1024:g}:{rooms[1] / 1024:g}]
plot "{data.name}" using 1:4 with linespoints pointtype 7 title "cppvmm", \\
     "" using 1:5 with linespoints pointtype 5 title "the touched extents alone, 16 bytes each"
unset multiplot
"""
    subprocess.run(["gnuplot", "-"], cwd=folder, input=script, text=True, check=True)
    return f"{name}.png"


def draw(folder, points):
    by_plot = {}
    for name, point in points.items():
        if not point.get("error_occurred"):
            by_plot.setdefault(name.split("/")[0], []).append(point)
    if by_plot and not shutil.which("gnuplot"):
        return ["no plots: there is no gnuplot"]
    drawn = [plot(folder, name, of_plot, of_plot[0]["label"]) for name, of_plot in by_plot.items()]
    return [f"plots in build/bench: {', '.join(drawn)}"] if drawn else []


def main(folder):
    benchmarks = read(folder)
    if not benchmarks:
        print("bench: no benchmark has such a name", file=sys.stderr)
        return 1
    rows, points = named(benchmarks, "beside/"), named(benchmarks, "against/")
    said = []
    if rows:
        lines, without = table_of(rows)
        said += lines + without
        (folder / "summary.json").write_text(json.dumps(summary_of(rows), indent=2) + "\n")
        reached = [row["value"] <= row["goal"] for row in rows.values() if not row.get("error_occurred")]
        said.append(f"{sum(reached)} of {len(reached)} goals met, {len(without)} not measured")
    said += [f"{name}: {each['error_message']}" for name, each in points.items() if each.get("error_occurred")]
    for name, each in benchmarks.items():
        if not name.startswith(("beside/", "against/")):
            took = f"{each.get('real_time', 0):.4g} {each.get('time_unit')}"
            said.append(f"{name}: {each['error_message'] if each.get('error_occurred') else took}")
    print("\n".join(said))
    for line in draw(folder, points):
        print(line, file=sys.stderr)
    failed = [name for name, each in benchmarks.items() if each.get("error_message", "").startswith("failed")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
