#!/usr/bin/env python3
"""Reads the module lines of the sources, checks them against the design, and draws docs/house.svg.

usage: house.py [--check] [--root DIR]

Without --check the picture is written. With it nothing is written, and the exit status says whether the picture is what
would be drawn. Sources that break the design are not drawn: the exit status is 1, and each violation is a line
FILE:LINE: what is wrong. The same sources always give the same picture, byte for byte.

The design, as far as it is checked here:
- the partitions of a module have no cycle, and neither have the modules;
- inside guest_memory, imports go down the layers only: survey, writes, evidence, memory;
- guest_memory and vcpu know nothing of each other, and hv_calls nothing of vcpu; no module imports hv_ext or
  vcpu_group;
- Boost and kernel headers are in internal partitions and implementation units, <linux/kvm.h> in vcpu alone; Asio is in
  vcpu_group alone, and there the interface may name it;
- an interface unit imports no internal partition; a front door exports every interface partition of its module, and
  is nothing but comments, its name and what it exports;
- CMake lists every source, interface units under INTERFACE, the others under INTERNAL.
"""

import argparse
import collections
import pathlib
import re
import sys
from html import escape

FOLDERS = ("modules", "guest_memory", "vcpu", "hv_ext")
PICTURE = "docs/house.svg"
HOMES = {  # where the units of a module are
    "cppvmm.guest_memory": "guest_memory/",
    "cppvmm.vcpu": "vcpu/",
    "cppvmm.hv_calls": "hv_ext/calls/",
    "cppvmm.hv_ext": "hv_ext/kvm/",
}
LAYERS = {  # of a module: a unit in one imports nothing of those behind it, nor of what lies beside them
    "cppvmm.guest_memory": [f"guest_memory/{layer}/" for layer in ("memory", "evidence", "writes", "survey")],
}
APART = [{"cppvmm.guest_memory", "cppvmm.vcpu"}, {"cppvmm.hv_calls", "cppvmm.vcpu"}]
FOR_EMBEDDERS = {"cppvmm.hv_ext", "cppvmm.vcpu_group"}  # nothing in the library imports these
ASIO_MODULE = "cppvmm.vcpu_group"
KVM_MODULES = {"cppvmm.vcpu", "cppvmm.vcpu_group"}


# ------------------------------------------------------------------------------------------------------------ reading


class Unit:
    """One source file that belongs to a module."""

    def __init__(self, path):
        self.path = path  # relative to the root, with slashes
        self.module = None  # "cppvmm.vcpu"
        self.partition = None  # "vm", "vm.impl"; None: the front door, or an implementation unit of the whole module
        self.line = 1
        self.is_interface = False
        self.imports = []  # (line, module, partition or None, exported)
        self.includes = []  # (line, header, file it is written in), those of local headers with them
        self.other = []  # (line, text): what is neither of the above, nor a comment

    @property
    def name(self):
        return self.module + (":" + self.partition if self.partition else "")

    @property
    def is_front_door(self):
        return self.is_interface and self.partition is None


def without_comments(text):
    """The text with comments blanked, strings kept, and every line where it was."""

    def blank(match):
        return match[0] if match[0][0] in "\"'" else re.sub(r"[^\n]", " ", match[0])

    token = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/'
    # A digit separator (1'000) opens no character literal.
    return re.sub(token, blank, re.sub(r"(?<=[0-9a-fA-F])'(?=[0-9a-fA-F])", "_", text), flags=re.S)


NAME = r"[\w.]+"
MODULE_LINE = re.compile(rf"(export\s+)?module\s+({NAME})\s*(?::\s*({NAME}))?\s*;$")
IMPORT_LINE = re.compile(rf"(export\s+)?import\s+(?:({NAME})|:\s*({NAME})|[<\"]([^>\"]+)[>\"])\s*;$")
INCLUDE_LINE = re.compile(r"#\s*include\s*([<\"])([^>\"]+)[>\"]")


def read_includes(root, path, seen, at_line=None):
    """(line, header, file) of every #include in a file, and in the files of this tree that it includes."""
    if path in seen:
        return []
    seen.add(path)
    found = []
    for number, line in enumerate(without_comments((root / path).read_text()).splitlines(), 1):
        match = INCLUDE_LINE.match(line.strip())
        if not match:
            continue
        quote, header = match.groups()
        found.append((at_line or number, header, path))
        if quote == '"':
            for candidate in (pathlib.PurePosixPath(path).parent / header, pathlib.PurePosixPath(header)):
                if (root / candidate).is_file():
                    found += read_includes(root, str(candidate), seen, at_line or number)
                    break
    return found


def read_unit(root, path):
    unit = Unit(path)
    for number, line in enumerate(without_comments((root / path).read_text()).splitlines(), 1):
        line = line.strip()
        if not line or line == "module;" or INCLUDE_LINE.match(line):
            if line:
                unit.other.append((number, line))
            continue
        if match := MODULE_LINE.match(line):
            exported, unit.module, unit.partition = match.groups()
            unit.is_interface = bool(exported)
            unit.line = number
        elif match := IMPORT_LINE.match(line):
            exported, module, partition, header = match.groups()
            if header:
                unit.includes.append((number, header, path))
                unit.other.append((number, line))
            else:
                unit.imports.append((number, module, partition, bool(exported)))
        else:
            unit.other.append((number, line))
    unit.imports = [(n, module or unit.module, partition, e) for n, module, partition, e in unit.imports]
    unit.includes += read_includes(root, path, set())
    return unit


def read_units(root):
    files = sorted(
        str(file.relative_to(root).as_posix())
        for folder in FOLDERS
        for file in (root / folder).rglob("*")
        if file.suffix in (".cppm", ".cpp", ".cc", ".cxx", ".ixx")
    )
    return [read_unit(root, path) for path in files]


def read_cmake(root):
    """{source: "INTERFACE" or "INTERNAL"} of the calls of cppvmm_add_module."""
    listed = {}
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("CMakeLists.txt")):
            text = re.sub(r"#[^\n]*", "", file.read_text())
            for call in re.findall(r"cppvmm_add_module\(([^)]*)\)", text):
                section = None
                for word in call.split():
                    if word in ("INTERFACE", "INTERNAL", "LINKS", "NEEDS", "COMPONENT"):
                        section = word
                    elif section in ("INTERFACE", "INTERNAL"):
                        listed[word] = section
    return listed


# ----------------------------------------------------------------------------------------------------------- checking


def find_cycle(edges):
    """A list [a, b, ..., a] along {node: [nodes]}, or None."""
    done, trail = set(), []

    def visit(node):
        if node in trail:
            return trail[trail.index(node) :] + [node]
        if node in done:
            return None
        trail.append(node)
        for target in edges.get(node, ()):
            if cycle := visit(target):
                return cycle
        trail.pop()
        done.add(node)
        return None

    for start in sorted(edges):
        if cycle := visit(start):
            return cycle
    return None


def is_kernel_header(header):
    return re.match(r"(linux|asm|asm-generic)/|sys/ioctl\.h$", header) is not None


def check_includes(unit):
    for line, header, written_in in unit.includes:
        by = "" if written_in == unit.path else f" (by {written_in})"
        if header.startswith("boost/asio") and unit.module != ASIO_MODULE:
            yield line, f"<{header}>{by}: Asio belongs in {ASIO_MODULE} alone"
        elif header == "linux/kvm.h" and unit.module not in KVM_MODULES:
            yield line, f"<{header}>{by}: KVM belongs in cppvmm.vcpu alone"
        elif unit.is_interface and is_kernel_header(header):
            yield line, f"<{header}>{by}: a kernel header in an interface unit"
        elif unit.is_interface and header.startswith("boost/") and not header.startswith("boost/asio"):
            yield line, f"<{header}>{by}: Boost in an interface unit makes every consumer need it"


def layer_of(unit):
    """A number, the higher the more it may import."""
    layers = LAYERS.get(unit.module, [])
    return next((n for n, layer in enumerate(layers) if unit.path.startswith(layer)), len(layers))


def check_imports(unit, by_name, modules):
    for line, module, partition, exported in unit.imports:
        target = by_name.get(f"{module}:{partition}" if partition else module)
        if partition is None and module == unit.module:
            yield line, f"{unit.name} imports the front door that it stands behind: name the partition"
        elif partition is not None:
            if target is None:
                yield line, f"imports :{partition}, which {unit.module} does not have"
            elif layer_of(target) > layer_of(unit):
                yield line, f"imports {target.name} from a layer above its own ({target.path})"
            elif unit.is_interface and not target.is_interface:
                yield line, f"an interface unit imports the internal partition {target.name}"
        elif module not in modules:
            yield line, f"imports {module}, which is no module of this tree"
        elif module in FOR_EMBEDDERS:
            yield line, f"{unit.module} imports {module}: nothing in the library may"
        elif {module, unit.module} in APART:
            yield line, f"{unit.module} imports {module}: the two know nothing of each other"


def check_front_door(unit, units):
    for line, text in unit.other:
        yield line, f"a front door holds only comments, its name and what it exports, not: {text}"
    exports = {(module, partition) for _, module, partition, exported in unit.imports if exported}
    for line, module, partition, exported in unit.imports:
        if not exported:
            yield line, "a front door exports what it imports"
    if unit.path != f"modules/{unit.module}.cppm":
        yield unit.line, f"the front door of {unit.module} belongs in modules/{unit.module}.cppm"
    for other in units:
        if other.module == unit.module and other.is_interface and other.partition:
            if (unit.module, other.partition) not in exports:
                yield unit.line, f"does not export {other.name}"


def check(root, units):
    """Every violation of the design, as lines."""
    found = []

    def add(path, line, text):
        found.append((path, line, text))

    by_name = {}
    for unit in units:
        if unit.module is None:
            add(unit.path, 1, "belongs to no module")
        elif unit.name in by_name and (unit.is_interface or unit.partition):
            add(unit.path, unit.line, f"{unit.name} is also in {by_name[unit.name].path}")
        elif unit.is_interface or unit.partition:
            by_name[unit.name] = unit
    named = [unit for unit in units if unit.module]
    modules = {unit.module for unit in named if unit.is_front_door}
    for unit in named:
        if unit.module not in modules:
            add(unit.path, unit.line, f"{unit.module} has no front door in modules/")
        for line, text in check_includes(unit):
            add(unit.path, line, text)
        for line, text in check_imports(unit, by_name, modules):
            add(unit.path, line, text)
        if unit.is_front_door:
            for line, text in check_front_door(unit, named):
                add(unit.path, line, text)
        elif unit.path.startswith("modules/"):
            add(unit.path, unit.line, "modules/ holds front doors only")
        elif not unit.path.startswith(home := HOMES.get(unit.module, "")):
            add(unit.path, unit.line, f"a unit of {unit.module} belongs in {home}")

    listed = read_cmake(root)
    for unit in named:
        section = listed.get(unit.path)
        wanted = "INTERFACE" if unit.is_interface else "INTERNAL"
        if section is None:
            add(unit.path, unit.line, "no cppvmm_add_module() lists this file")
        elif section != wanted:
            add(unit.path, unit.line, f"is listed under {section} and belongs under {wanted}")

    partitions, between = {}, {}
    for unit in named:
        for _, module, partition, _ in unit.imports:
            if partition:
                partitions.setdefault(unit.name, []).append(f"{module}:{partition}")
            elif module != unit.module:
                between.setdefault(unit.module, []).append(module)
    for edges in (partitions, between):
        if cycle := find_cycle(edges):
            at = by_name.get(cycle[0])
            add(at.path if at else "modules", at.line if at else 1, "a cycle of imports: " + " -> ".join(cycle))
    return [f"{path}:{line}: {text}" for path, line, text in sorted(found)]


# ------------------------------------------------------------------------------------------------------------ laying


class Layout:
    """Boxes in rows, each above what it points to; a line that passes a row gets a lane of its own there."""

    def __init__(self, sizes, edges, gap, row_gap):
        self.sizes = dict(sizes)  # {box: (width, height)}
        self.gap, self.row_gap = gap, row_gap
        self.edges = sorted(set(edges))  # (from, to, style)
        self.assign_rows()
        self.make_lanes()
        self.order_rows()
        self.place()

    def assign_rows(self):
        below, above = collections.defaultdict(set), collections.defaultdict(set)
        for a, b, _ in self.edges:
            below[a].add(b)
            above[b].add(a)
        self.row = {}

        def height(box):
            if box not in self.row:
                self.row[box] = 1 + max((height(other) for other in sorted(below[box])), default=-1)
            return self.row[box]

        for box in sorted(self.sizes):
            height(box)
        # What is used only high up moves up, to where it is used.
        for box in sorted(self.sizes, key=lambda b: (-self.row[b], b)):
            if above[box]:
                self.row[box] = min(self.row[other] for other in above[box]) - 1

    def make_lanes(self):
        """Lines to the same box share their lanes."""
        self.segments = []
        for a, b, style in self.edges:
            at = a
            for row in range(self.row[a] - 1, self.row[b], -1):
                lane = ("lane", b, style, row)
                self.sizes.setdefault(lane, (10, 0))
                self.row[lane] = row
                self.segments.append((at, lane, style))
                at = lane
            self.segments.append((at, b, style))
        self.segments = sorted(set(self.segments), key=repr)

    def order_rows(self):
        count = max(self.row.values(), default=-1) + 1
        rows = [sorted((box for box in self.sizes if self.row[box] == r), key=repr) for r in range(count)]
        near = {+1: collections.defaultdict(list), -1: collections.defaultdict(list)}
        for a, b, _ in self.segments:
            near[-1][a].append(b)
            near[+1][b].append(a)

        def crossings(rows):
            position = {box: i for row in rows for i, box in enumerate(row)}
            total = 0
            for r in range(1, count):
                ends = [(position[a], position[b]) for a, b, _ in self.segments if self.row[a] == r]
                total += sum((p[0] - q[0]) * (p[1] - q[1]) < 0 for i, p in enumerate(ends) for q in ends[:i])
            return total

        best, best_cost = rows, crossings(rows)
        for sweep in range(40):
            side = +1 if sweep % 2 == 0 else -1
            for r in range(count - 1, -1, -1) if side == +1 else range(count):
                position = {box: i for row in rows for i, box in enumerate(row)}

                def centre(box):
                    others = near[side][box]
                    return sum(position[o] for o in others) / len(others) if others else position[box]

                rows = rows[:r] + [sorted(rows[r], key=lambda box: (centre(box), position[box]))] + rows[r + 1 :]
            # Neighbours change places where that saves a crossing.
            improved = True
            while improved:
                improved = False
                for r in range(count):
                    for i in range(len(rows[r]) - 1):
                        swapped = [list(row) for row in rows]
                        swapped[r][i], swapped[r][i + 1] = swapped[r][i + 1], swapped[r][i]
                        if crossings(swapped) < crossings(rows):
                            rows, improved = swapped, True
            if (cost := crossings(rows)) < best_cost:
                best, best_cost = rows, cost
        self.rows = best

    def place(self):
        self.x = {}
        for row in self.rows:
            at = 0
            for box in row:
                self.x[box] = at + self.sizes[box][0] / 2
                at += self.sizes[box][0] + self.gap
        near = collections.defaultdict(list)
        for a, b, _ in self.segments:
            near[a].append(b)
            near[b].append(a)
        for sweep in range(60):
            for row in self.rows if sweep % 2 else reversed(self.rows):
                wish = [sum(self.x[o] for o in near[b]) / len(near[b]) if near[b] else self.x[b] for b in row]
                for box, x in zip(row, self.spread(row, wish)):
                    self.x[box] = x
        left = min((self.x[b] - self.sizes[b][0] / 2 for b in self.sizes), default=0)
        for box in self.x:
            self.x[box] = round(self.x[box] - left)
        self.width = round(max((self.x[b] + self.sizes[b][0] / 2 for b in self.sizes), default=0))
        self.top, self.bottom = {}, {}
        y = 0
        for r in range(len(self.rows) - 1, -1, -1):
            tallest = max(self.sizes[b][1] for b in self.rows[r])
            self.top[r], self.bottom[r] = y, y + tallest
            y += tallest + self.row_gap
        self.height = max(0, y - self.row_gap)

    def spread(self, row, wish):
        """The positions nearest to the wished ones (least squares) that keep the order and the gaps."""
        offset, offsets = 0, []
        for i, box in enumerate(row):
            if i:
                offset += (self.sizes[row[i - 1]][0] + self.sizes[box][0]) / 2 + self.gap
            offsets.append(offset)
        pools = []  # [sum, weight, members]
        for i, box in enumerate(row):
            weight = 4 if box[0] == "lane" else 1
            pools.append([(wish[i] - offsets[i]) * weight, weight, 1])
            while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
                last = pools.pop()
                pools[-1] = [x + y for x, y in zip(pools[-1], last)]
        starts = [pool[0] / pool[1] for pool in pools for _ in range(pool[2])]
        return [start + offset for start, offset in zip(starts, offsets)]

    def lines(self):
        """(from, to, style, x at the upper end, x at the lower end) of each segment, spread over its boxes' sides."""
        ends = collections.defaultdict(list)
        for segment in self.segments:
            a, b, _ = segment
            ends["down", a].append((self.x[b], repr(segment), segment))
            ends["up", b].append((self.x[a], repr(segment), segment))
        x = {}
        for (side, box), found in ends.items():
            found.sort()
            room = min(18, (self.sizes[box][0] - 24) / max(1, len(found) - 1)) if box[0] != "lane" else 0
            for i, (_, _, segment) in enumerate(found):
                x[side, segment] = round(self.x[box] + (i - (len(found) - 1) / 2) * room)
        return [(a, b, s, x["down", (a, b, s)], x["up", (a, b, s)]) for a, b, s in self.segments]


# ----------------------------------------------------------------------------------------------------------- drawing

STYLE = """
  text { font-family: "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; fill: #1f2328; text-anchor: middle; }
  .module { font-size: 15px; font-weight: bold; }
  .path, .files, .tag, .legend { font-size: 10px; fill: #59636e; }
  .name { font-size: 12px; font-weight: bold; }
  .tag { fill: #8250df; }
  .legend { text-anchor: start; }
  .paper { fill: #ffffff; }
  .house { fill: #f6f8fa; stroke: #59636e; stroke-width: 1.5; stroke-linejoin: round; }
  .roof { fill: #eaeef2; stroke: #59636e; stroke-width: 1.5; stroke-linejoin: round; }
  .room { fill: #ffffff; stroke: #0969da; stroke-width: 1.5; }
  .inner { fill: #f6f8fa; stroke: #59636e; stroke-width: 1.2; stroke-dasharray: 4 3; }
  .line { fill: none; stroke: #0969da; stroke-width: 1.3; }
  .inside { fill: none; stroke: #818b98; stroke-width: 1.2; stroke-dasharray: 4 3; }
  .between { fill: none; stroke: #1f2328; stroke-width: 2; }
  .tip-line { fill: #0969da; }
  .tip-inside { fill: #818b98; }
  .tip-between { fill: #1f2328; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .path, .files, .legend { fill: #9198a1; }
    .tag { fill: #ab7df8; }
    .paper { fill: #0d1117; }
    .house { fill: #151b23; stroke: #9198a1; }
    .roof { fill: #212830; stroke: #9198a1; }
    .room { fill: #0d1117; stroke: #4493f8; }
    .inner { fill: #151b23; stroke: #9198a1; }
    .line { stroke: #4493f8; }
    .inside { stroke: #656c76; }
    .between { stroke: #e6edf3; }
    .tip-line { fill: #4493f8; }
    .tip-inside { fill: #656c76; }
    .tip-between { fill: #e6edf3; }
  }
"""

ROOF, EAVES, PADDING = 34, 30, 18


def text_width(text, size):
    return len(text) * size * 0.64  # more than a sans-serif needs on average, so that a wider font still fits


class Room:
    """A partition, with the implementation units that belong to it."""

    def __init__(self, unit):
        self.unit = unit
        self.annexes = []

    @property
    def units(self):
        return [self.unit] + self.annexes

    def text(self, own_module):
        """(class, size, text) a line."""
        lines = [("name", 12, self.unit.partition.removesuffix(".impl"))]
        first, *others = (pathlib.PurePosixPath(unit.path) for unit in self.units)
        short = (file.suffix if file.stem == first.stem else file.name for file in others)
        lines.append(("files", 10, " ".join([first.name, *short])))
        tags = []
        headers = [header for unit in self.units for _, header, _ in unit.includes]
        if any(map(is_kernel_header, headers)):
            tags.append("kernel headers")
        if any(header.startswith("boost/asio") for header in headers):
            tags.append("Boost.Asio")
        elif any(header.startswith("boost/icl") for header in headers):
            tags.append("Boost.ICL")
        elif any(header.startswith("boost/") for header in headers):
            tags.append("Boost")
        others = {module for unit in self.units for _, module, _, _ in unit.imports if module != own_module}
        tags += ["→ " + module.partition(".")[2] for module in sorted(others)]
        return lines + [("tag", 10, tag) for tag in tags]


def reachable(edges, start, avoid=None):
    """What can be reached from start along (from, to, style); avoid: an edge that may not be taken."""
    found, todo = set(), [start]
    while todo:
        node = todo.pop()
        for edge in edges:
            if edge[0] == node and edge != avoid and edge[1] not in found:
                found.add(edge[1])
                todo.append(edge[1])
    return found


def without_implied(edges, strong):
    """The edges that no path implies: of the strong style, a path of its own style; of the other, any path."""
    kept = sorted(set(edges))
    for edge in list(kept):
        ways = [e for e in kept if e[2] == strong] if edge[2] == strong else kept
        if edge[1] in reachable(ways, edge[0], avoid=edge):
            kept.remove(edge)
    return kept


class House:
    """A module, with its partitions as rooms."""

    def __init__(self, door, units):
        self.module, self.door = door.module, door
        mine = {unit.partition: unit for unit in units if unit.module == self.module and unit.partition}
        used = {p for unit in units for _, module, p, _ in unit.imports if module == self.module and p}
        self.rooms = {}
        annexes = []
        for partition, unit in sorted(mine.items()):
            owner = partition.rsplit(".", 1)[0]
            if not unit.is_interface and partition not in used and owner != partition and owner in mine:
                annexes.append((owner, unit))
            else:
                self.rooms[partition] = Room(unit)
        for owner, unit in annexes:
            self.rooms[owner].annexes.append(unit)

        solid, dashed = [], []
        for partition, room in self.rooms.items():
            for unit in room.units:
                for _, module, target, _ in unit.imports:
                    if module == self.module and target in self.rooms and target != partition:
                        if unit is room.unit:
                            solid.append((partition, target, "line"))
                        else:
                            dashed.append((partition, target, "inside"))
        edges = sorted(set(solid))
        # An implementation may import what stands on its own interface: that line goes up. It is laid as one that goes
        # down, from its tip.
        up = []
        for a, b, style in sorted(set(dashed)):
            if a in reachable(edges, b):
                up.append((b, a, "up"))
            elif (a, b, "line") not in edges:
                edges.append((a, b, style))
        self.text = {partition: room.text(self.module) for partition, room in self.rooms.items()}
        sizes = {}
        for partition, lines in self.text.items():
            width = max(text_width(text, size) for _, size, text in lines) + 16
            sizes[partition] = (2 * round(max(70, width) / 2), 14 + sum(size + 4 for _, size, _ in lines))
        self.layout = Layout(sizes, without_implied(edges, "line") + up, 14, 44)
        name = max(text_width(self.module, 16.5) + 2 * EAVES, text_width(self.door.path, 10) + 2 * PADDING)
        self.width = 2 * round(max(self.layout.width + 2 * PADDING, name) / 2)
        self.height = ROOF + 26 + self.layout.height + PADDING

    def draw(self, x, y, out):
        out.append(f'<g><title>{escape(self.module)}: {escape(self.door.path)}</title>')
        right, walls = x + self.width, y + ROOF
        out.append(f'<rect class="house" x="{x + 8}" y="{walls}" width="{self.width - 16}" height="{self.height - ROOF}"/>')
        out.append(f'<path class="roof" d="M{x} {walls} L{x + EAVES} {y} H{right - EAVES} L{right} {walls} Z"/>')
        out.append(text_at("module", x + self.width // 2, y + ROOF - 11, self.module))
        out.append(text_at("path", x + self.width // 2, y + ROOF + 16, self.door.path))
        left, top, lay = x + (self.width - self.layout.width) // 2, y + ROOF + 26, self.layout
        draw_lines(lay, left, top, out)
        for partition, room in self.rooms.items():
            width = lay.sizes[partition][0]
            row = lay.row[partition]
            height = lay.bottom[row] - lay.top[row]
            at_x, at_y = left + lay.x[partition] - width // 2, top + lay.top[row]
            imports = sorted({
                (":" + p if module == self.module else module)
                for unit in room.units
                for _, module, p, _ in unit.imports
                if (module, p) != (self.module, partition)
            })
            title = room.unit.name + (" imports " + ", ".join(imports) if imports else " imports nothing")
            style = "room" if room.unit.is_interface else "inner"
            out.append(f'<g><title>{escape(title)}</title>')
            out.append(f'<rect class="{style}" x="{at_x}" y="{at_y}" width="{width}" height="{height}" rx="4"/>')
            line_y = at_y + 5 + (height - 14 - sum(size + 4 for _, size, _ in self.text[partition])) // 2
            for style, size, text in self.text[partition]:
                line_y += size + 4
                out.append(text_at(style, left + lay.x[partition], line_y, text))
            out.append("</g>")
        out.append("</g>")


def text_at(style, x, y, text):
    return f'<text class="{style}" x="{x}" y="{y}">{escape(text)}</text>'


def draw_lines(lay, left, top, out, top_of=None):
    """The lines of a layout; top_of: where a box begins that is lower than its row."""
    for a, b, style, x1, x2 in lay.lines():
        x1, x2 = left + x1, left + x2
        y1, y2 = top + lay.bottom[lay.row[a]], top + lay.top[lay.row[b]]
        middle = (y1 + y2) // 2
        path = f"C{x1} {middle} {x2} {middle} {x2} {y2}"
        lane_end = f" V{top + lay.bottom[lay.row[b]]}" if b[0] == "lane" else ""
        if style == "up":
            start = y1 if a[0] == "lane" else y1 + 6
            out.append(f'<path class="inside" d="M{x1} {start} {path}{lane_end}"/>')
            if a[0] != "lane":
                out.append(f'<path class="tip-inside" d="M{x1} {y1} l-4 8 h8 Z"/>')
            continue
        if lane_end:
            out.append(f'<path class="{style}" d="M{x1} {y1} {path}{lane_end}"/>')
            continue
        tip = top_of[b] if top_of else y2
        path = f"M{x1} {y1} C{x1} {middle} {x2} {middle} {x2} {y2 - 6}" + (f" V{tip - 6}" if tip != y2 else "")
        out.append(f'<path class="{style}" d="{path}"/>')
        out.append(f'<path class="tip-{style}" d="M{x2} {tip} l-4 -8 h8 Z"/>')


def draw(units):
    units = [unit for unit in units if unit.module]
    houses = {unit.module: House(unit, units) for unit in units if unit.is_front_door}
    edges = {
        (unit.module, module, "between")
        for unit in units
        for _, module, _, _ in unit.imports
        if module != unit.module and module in houses and unit.module in houses
    }
    lay = Layout({m: (h.width, h.height) for m, h in houses.items()}, without_implied(edges, "between"), 40, 64)
    legend = [
        ("room", "a partition that the module exports"),
        ("inner", "an internal partition"),
        ("line", "a partition imports"),
        ("inside", "its implementation imports"),
        ("between", "a module imports another"),
    ]
    margin = 20
    width = max(lay.width, sum(text_width(text, 10) + 54 for _, text in legend)) + 2 * margin
    width = round(width)
    left = (width - lay.width) // 2
    height = lay.height + 2 * margin + 56
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img">',
        "<title>The modules of cppvmm, their partitions, and what imports what</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
    ]
    top_of = {m: margin + lay.bottom[lay.row[m]] - h.height for m, h in houses.items()}

    draw_lines(lay, left, margin, out, top_of)
    for module, house in sorted(houses.items()):
        house.draw(left + lay.x[module] - house.width // 2, top_of[module], out)

    x, y = margin, height - margin - 20
    for style, text in legend:
        if style in ("room", "inner"):
            out.append(f'<rect class="{style}" x="{x}" y="{y - 9}" width="24" height="12" rx="3"/>')
        else:
            out.append(f'<path class="{style}" d="M{x} {y - 3} h18"/>')
            out.append(f'<path class="tip-{style}" d="M{x + 24} {y - 3} l-8 -4 v8 Z"/>')
        out.append(text_at("legend", x + 30, y, text))
        x += round(text_width(text, 10)) + 54
    out.append(text_at("legend", margin, height - margin, "An import that the others imply is left out."))
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Draws docs/house.svg from the sources, and checks them.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the picture is out of date")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    arguments = parser.parse_args()
    root = arguments.root.resolve()

    units = read_units(root)
    violations = check(root, units)
    for violation in violations:
        print(violation)
    if violations:
        return 1
    picture = draw(units)
    file = root / PICTURE
    is_current = file.is_file() and file.read_text() == picture
    if arguments.check:
        if not is_current:
            print(f"{PICTURE}:1: out of date: run ./dev graph")
    elif not is_current:
        file.write_text(picture)
        print(f"wrote {PICTURE}")
    return 1 if arguments.check and not is_current else 0


if __name__ == "__main__":
    sys.exit(main())
