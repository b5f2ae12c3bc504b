#!/usr/bin/env python3
"""Draws the three attentions for the README: dev/attentions.py > dev/attentions.svg"""

PANEL, ROW, TOP = 280, 58, 58  # width of a panel; height of a layer's row; of the headings
LAYERS = 4
Q, K, V, BOX = 84, 158, 194, 30  # x of the boxes' centres within a panel; their width
KV = K - BOX / 2 - 5  # the left edge of the frame around k and v
STYLE = """
  text { font: 14px sans-serif; fill: #1f2328; text-anchor: middle }
  .name { font-weight: bold; font-size: 16px }
  .note { font-size: 12px; fill: #59636e }
  rect { fill: #f6f8fa; stroke: #818b98 }
  .pair { fill: none; stroke-dasharray: 3 }
  path { fill: none; stroke: #818b98; stroke-width: 1.5; marker-end: url(#grey) }
  .new path { stroke: #0969da; stroke-width: 2; marker-end: url(#blue) }
  .grey { fill: #818b98 }
  .blue { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .note { fill: #9198a1 }
    rect { fill: #151b23; stroke: #9198a1 }
    path { stroke: #9198a1 }
    .new path { stroke: #4493f8 }
    .grey { fill: #9198a1 }
    .blue { fill: #4493f8 }
  }
"""


def y_of(layer):
    return TOP + (LAYERS - 1 - layer) * ROW + ROW / 2


def text(x, y, content, kind=""):
    return f'<text x="{x}" y="{y}" class="{kind}">{content}</text>'


def arrow(*points):
    """A line from the first point to the last; with four points, a Bézier curve."""
    pairs = [f"{x},{y:g}" for x, y in points]
    return f'<path d="M {pairs[0]} {"C" if len(pairs) == 4 else "L"} {" ".join(pairs[1:])}"/>'


def panel(x0, name, note, arrows, value="v"):
    shapes = [text(PANEL / 2, 24, name, "name"), text(PANEL / 2, 46, note, "note")]
    for layer in range(LAYERS):
        y = y_of(layer)
        shapes.append(text(30, y + 5, f"layer {layer}", "note"))
        shapes.append(f'<rect x="{KV}" y="{y - 18}" width="{V + BOX / 2 + 5 - KV}" height="36" rx="8" class="pair"/>')
        for x, letter in ((Q, "q"), (K, "k"), (V, value if layer else "v")):
            shapes.append(f'<rect x="{x - BOX / 2}" y="{y - 13}" width="{BOX}" height="26" rx="5"/>')
            shapes.append(text(x, y + 5, letter))
    own = [arrow((Q + BOX / 2 + 2, y_of(layer)), (KV - 2, y_of(layer))) for layer in range(LAYERS)]
    return f'<g transform="translate({x0})">{"".join(shapes + own)}<g class="new">{"".join(arrows)}</g></g>'


def skip_arrows(distance=2):
    """From a layer's queries to keys and values `distance` layers below"""
    for layer in range(distance, LAYERS):
        start, end = (Q + BOX / 2, y_of(layer) + 7), (KV - 2, y_of(layer - distance) - 9)
        yield arrow(start, (K - 6, start[1] + 8), (Q + 2, end[1] - 8), end)


def depth_arrows(stride=2):
    """From the values of every `stride`-th layer to those of all layers above"""
    right = V + BOX / 2 + 5
    for source in range(0, LAYERS - 1, stride):
        for layer in range(source + 1, LAYERS):
            bend = right + 14 + 18 * (layer - source)
            start, end = (right, y_of(source) - 3), (right + 4, y_of(layer) + 5)
            yield arrow(start, (bend, start[1]), (bend, end[1]), end)


def main():
    width, height = 3 * PANEL, TOP + LAYERS * ROW + 6
    heads = "".join(f'<marker id="{colour}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                    'markerUnits="userSpaceOnUse" orient="auto">'
                    f'<polygon class="{colour}" points="0,0 8,4 0,8"/></marker>' for colour in ("grey", "blue"))
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
          f"<style>{STYLE}</style><defs>{heads}</defs>")
    print(panel(0, "vanilla", "q attends to its own layer", []))
    print(panel(PANEL, "skip", "in some heads, to two layers below", skip_arrows()))
    print(panel(2 * PANEL, "depth", "v is mixed into ṽ of layers above", depth_arrows(), "ṽ"))
    print("</svg>")


if __name__ == "__main__":
    main()
