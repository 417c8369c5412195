"""Films side by side: panels with titles and captions drawn in, and a border that tells given frames from made ones."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from ahriuwu_cli.data.video import MAX_PIXELS

if TYPE_CHECKING:
    import numpy as np

MAX_SIDE = 16_384  # pixels of a side of a picture that is written: x264 takes no more
CONTEXT = (255, 170, 0)  # frames that were given
GENERATED = (60, 130, 230)  # frames that were made
INK, PAPER = (235, 235, 235), (24, 24, 24)
BORDER, TITLE, FOOTER, FONT = 3, 16, 18, 12


def compose(
    panels: list[tuple[str, np.ndarray]], *, scale: int = 4, context: int = 0, captions: list[str] | None = None
) -> np.ndarray:
    """Panels (title, uint8 (T, H, W, 3)) side by side -> uint8 (T, H', W', 3), upscaled by nearest neighbour.

    The first `context` frames get the border of CONTEXT, the rest of GENERATED; the footer shows the frame's index and
    captions[t]. All panels need the same T; captions may be shorter.
    """
    return compose_grid(panels, columns=len(panels), scale=scale, context=context, captions=captions)


def compose_grid(
    cells: list[tuple[str, np.ndarray]],
    *,
    columns: int = 4,
    scale: int = 4,
    context: int = 0,
    captions: list[str] | None = None,
) -> np.ndarray:
    """As `compose`, with the cells laid row by row, `columns` to a row. All need the same shape."""
    import numpy as np

    shapes = {frames.shape for _, frames in cells}
    assert len(shapes) == 1, shapes
    length, h, w, _ = shapes.pop()
    page = Page([title for title, _ in cells], h, w, columns=columns, scale=scale, context=context, captions=captions)
    return np.stack([page.picture(t, [frames[t] for _, frames in cells]) for t in range(length)])


def page_size(panels: int, height: int, width: int, columns: int, scale: int) -> tuple[int, int]:
    """Height and width of a `Page` of panels of height x width."""
    columns = min(columns, panels)
    end = -(-panels // columns) * (TITLE + height * scale + 2 * BORDER) + FOOTER
    return end + end % 2, columns * (width * scale + 2 * BORDER)


def largest_scale(most: int, panels: int, height: int, width: int, columns: int, max_pixels: int = MAX_PIXELS) -> int:
    """The largest enlargement up to `most` at which a `Page` has no more pixels, and can be written; 0: not even 1."""
    for scale in range(most, 0, -1):
        h, w = page_size(panels, height, width, columns, scale)
        if h * w <= max_pixels and max(h, w) <= MAX_SIDE:
            return scale
    return 0


class Page:
    """The grid of `compose_grid`, drawn frame by frame: its titles are laid out once. height, width are a panel's."""

    def __init__(
        self,
        titles: list[str],
        height: int,
        width: int,
        *,
        columns: int = 4,
        scale: int = 4,
        context: int = 0,
        captions: list[str] | None = None,
    ) -> None:
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont

        self.scale, self.context, self.captions = scale, context, captions or []
        self._side = (height * scale, width * scale)
        cell_h, cell_w = TITLE + self._side[0] + 2 * BORDER, self._side[1] + 2 * BORDER
        columns = min(columns, len(titles))
        self._end = -(-len(titles) // columns) * cell_h + FOOTER
        self._font = ImageFont.load_default(FONT)
        page = Image.new("RGB", page_size(len(titles), height, width, columns, scale)[::-1], PAPER)
        draw = ImageDraw.Draw(page)
        self._corners = [((i // columns) * cell_h, (i % columns) * cell_w) for i in range(len(titles))]
        for (top, left), title in zip(self._corners, titles, strict=True):
            draw.text((left + BORDER, top + 1), _fit(title, cell_w - BORDER, self._font), INK, self._font)
        self._blank = np.asarray(page)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture: (H', W', 3)."""
        return self._blank.shape

    def picture(self, t: int, panels: list[np.ndarray]) -> np.ndarray:
        """Frame t of the film, uint8 (H', W', 3), from frame t of every panel, uint8 (H, W, 3)."""
        import numpy as np
        from PIL import Image, ImageDraw

        out, given = self._blank.copy(), t < self.context
        caption = self.captions[t] if t < len(self.captions) else ""
        footer = Image.new("RGB", (out.shape[1], FOOTER), PAPER)
        text = _fit(f"{t:4d}  {caption}", out.shape[1] - BORDER, self._font)
        ImageDraw.Draw(footer).text((BORDER, 1), text, CONTEXT if given else INK, self._font)
        out[self._end - FOOTER : self._end] = np.asarray(footer)
        h, w = self._side
        for (top, left), panel in zip(self._corners, panels, strict=True):
            out[top + TITLE : top + TITLE + h + 2 * BORDER, left : left + w + 2 * BORDER] = (
                CONTEXT if given else GENERATED
            )
            top, left = top + TITLE + BORDER, left + BORDER
            out[top : top + h, left : left + w] = panel.repeat(self.scale, 0).repeat(self.scale, 1)
        return out


def _fit(text: str, width: int, font) -> str:
    """The text, cut with dots where it is wider than width pixels. No more letters than pixels are ever measured."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(min(len(text), width)), width, key=lambda n: font.getlength(text[:n] + ".."))
    return text[: max(0, fitting - 1)] + ".."
