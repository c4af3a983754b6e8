"""heat_plot.py SVG TITLE NAME=LOG...: draws what cppvmm-boot --host-memory-log wrote in each LOG, by gnuplot: host memory
over time, with a mark where the guest asked which memory is zero."""

import pathlib
import subprocess
import sys

MIB = 1 << 20


def read(log):
    """Samples and, of these, answers: (seconds, MiB)."""
    samples, answers = [], []
    for line in log.read_text().splitlines():
        words = line.split()
        point = int(words[0]) / 1000, int(words[1]) / MIB
        samples.append(point)
        if words[2:] == ["answer"]:
            answers.append(point)
    return samples, answers


def block(name, points):
    return f"${name} << EOD\n" + "".join(f"{x:.2f} {y:.1f}\n" for x, y in points) + "EOD\n"


def script_of(svg, title, logs):
    data, plots = "", []
    for index, (name, log) in enumerate(logs):
        samples, answers = read(log)
        data += block(f"samples{index}", samples) + block(f"answers{index}", answers)
        plots.append(f'$samples{index} with lines linetype {index + 1} title "{name}"')
        plots.append(f"$answers{index} with points pointtype 7 linetype {index + 1} notitle")
    return f"""{data}
set terminal svg noenhanced size 900,450 font "sans-serif,14" linewidth 1.5 background "white"
set output "{svg}"
set title "{title}"
set grid
set key top right
set xlabel "time [s]"
set ylabel "host memory of guest RAM [MiB]"
set yrange [0:*]
set offsets graph 0, 0, 0.05, 0
plot {", ".join(plots)}
"""


def main(svg, title, *logs):
    named = [(name, pathlib.Path(path)) for name, path in (log.split("=", 1) for log in logs)]
    subprocess.run(["gnuplot", "-"], input=script_of(svg, title, named), text=True, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
