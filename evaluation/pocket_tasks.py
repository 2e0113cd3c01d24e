"""The pocket model's tasks: questions about pictures, videos and sheets composed from real handwritten digits.

The digits are the 1,797 scans of scikit-learn's `load_digits` (8 x 8 grey values, UCI "optical recognition of
handwritten digits"), each of which belongs to exactly one split, fixed here. A picture is one scan, enlarged, inside a
coloured frame. Every row of every split is a pure function of (task, split, seed, index), so a run that was stopped
goes on with the rows that it would have seen, and no test scan can reach a training row.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

SIDE = 56  # pixels of a picture's side: exactly what the pocket model's vision tower takes
SHEET = (168, 224)  # height and width of a big sheet: 3 x 4 tiles of one picture each
SHEET_SCAN = 32  # pixels of the scan's side on a sheet
SPLITS = ("train", "validation", "test")
TASKS = ("caption", "read", "framed", "count", "order", "first_last", "sheet")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 200),
    "orange": (245, 130, 20),
    "white": (240, 240, 240),
    "cyan": (40, 210, 220),
}
COUNTED = 7  # the digit that the counting questions ask for
MAX_COUNT = 9
MAX_ORDER = len(COLOURS)

QUESTIONS = {
    "read": ("What does the picture show?", "Describe the picture.", "What is in the picture?"),
    "digit": ("Which digit is it?", "Which digit does the picture show?", "Read the digit."),
    "colour": ("Which colour is the frame?", "What is the colour of the frame?"),
    "framed": (
        "Which digit has the {colour} frame?",
        "Which digit is in the {colour} frame?",
        "Read the digit with the {colour} frame.",
    ),
    "count": (
        "How many pictures show a {digit}?",
        "How often does a {digit} appear?",
        "Count the pictures that show a {digit}.",
    ),
    "list": ("Read all the digits in order.", "Which digits are there, in order?"),
    "order": (
        "In which order do the frame colours come?",
        "List the frame colours in order.",
        "What is the order of the colours?",
    ),
    "first": ("Which digit comes first?", "What is the first digit?"),
    "last": ("Which digit comes last?", "What is the last digit?"),
    "first_last": ("Which digits come first and last?", "What is first and last in the video?"),
    "sheet": ("Which digit is on the sheet?", "Find the digit on the sheet.", "Read the small digit."),
}


@lru_cache(maxsize=1)
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans (1797, 8, 8) float32 in 0..1 and their digits (1797,) int64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=3)
def split_scans(split: str) -> tuple[np.ndarray, ...]:
    """Indices of the split's scans, one array per digit 0..9.

    Within each digit every fifth scan is a test scan and every twentieth a validation scan (5 %: watched during
    training); the rest (75 %) train.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    targets = load_scans()[1]
    chosen = []
    for digit in range(10):
        indices = np.flatnonzero(targets == digit)
        place = np.arange(len(indices))
        test, validation = place % 5 == 4, place % 20 == 0
        mask = {"test": test, "validation": validation, "train": ~test & ~validation}[split]
        chosen.append(indices[mask])
    return tuple(chosen)


def enlarge(
    scans: np.ndarray, height: int, width: int, side: np.ndarray, centre: np.ndarray, rng: np.random.Generator | None
) -> np.ndarray:
    """Draw each scan (n, 8, 8) at its own size and place on an empty canvas: (n, height, width) in 0..1.

    `side` (n,) is the drawn scan's side in pixels, `centre` (n, 2) its middle (y, x). With an `rng` the scan is also
    turned, sheared, stretched and bent a little, a new writer's hand so to speak; without one it stays as it is.
    """
    n = len(scans)
    y = np.arange(height, dtype=np.float32)[None, :, None] - centre[:, 0, None, None].astype(np.float32)
    x = np.arange(width, dtype=np.float32)[None, None, :] - centre[:, 1, None, None].astype(np.float32)
    matrix = np.tile(np.eye(2, dtype=np.float32), (n, 1, 1))
    if rng is not None:
        angle, shear = rng.normal(0, 0.1, n), rng.normal(0, 0.1, n)
        stretch = np.exp(rng.normal(0, 0.08, (n, 2)))
        cos, sin = np.cos(angle), np.sin(angle)
        matrix[:, 0, 0], matrix[:, 0, 1] = cos * stretch[:, 0], -sin * stretch[:, 0]
        matrix[:, 1, 0], matrix[:, 1, 1] = (sin + shear * cos) * stretch[:, 1], (cos - shear * sin) * stretch[:, 1]
    matrix = (matrix * (8 / side)[:, None, None]).astype(np.float32)
    row = matrix[:, 0, 0, None, None] * y + matrix[:, 0, 1, None, None] * x + 3.5  # scan coordinates of each pixel
    column = matrix[:, 1, 0, None, None] * y + matrix[:, 1, 1, None, None] * x + 3.5
    if rng is not None:
        bend = rng.normal(0, 0.22, (4, n, 1, 1)).astype(np.float32)  # four slow waves over the scan
        phase = rng.uniform(0, 2 * np.pi, (4, n, 1, 1)).astype(np.float32)
        step = np.float32(np.pi / 4)
        row, column = (
            row + bend[0] * np.sin(column * step + phase[0]) + bend[1] * np.sin(row * step + phase[1]),
            column + bend[2] * np.sin(row * step + phase[2]) + bend[3] * np.sin(column * step + phase[3]),
        )
    padded = np.zeros((n, 11, 11), dtype=np.float32)  # a ring of background, and one more for the second neighbour
    padded[:, 1:9, 1:9] = scans
    row, column = np.clip(row + 1, 0, 9), np.clip(column + 1, 0, 9)
    top, left = row.astype(np.intp), column.astype(np.intp)
    row, column = row - top, column - left
    flat, corner = padded.reshape(-1), (np.arange(n)[:, None, None] * 121) + top * 11 + left
    upper = flat[corner] * (1 - column) + flat[corner + 1] * column
    lower = flat[corner + 11] * (1 - column) + flat[corner + 12] * column
    return upper * (1 - row) + lower * row


def ink(drawn: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Strokes (n, height, width) in 0..1 -> bright ink on dark paper, (n, height, width, 3) float32 in 0..255."""
    n = len(drawn)
    dark, bright = np.full((n, 1, 1), 24, np.float32), np.full((n, 1, 1), 235, np.float32)
    if rng is not None:
        drawn = drawn ** np.exp(rng.normal(0, 0.25, (n, 1, 1))).astype(np.float32)
        dark = rng.uniform(10, 40, (n, 1, 1)).astype(np.float32)
        bright = rng.uniform(200, 255, (n, 1, 1)).astype(np.float32)
    return np.repeat((dark + drawn * (bright - dark))[..., None], 3, axis=-1)


def draw_pictures(scans: np.ndarray, colours: list[str], rng: np.random.Generator, augment: bool) -> np.ndarray:
    """One picture (SIDE, SIDE, 3) uint8 per scan (n, 8, 8): the scan near the middle, inside its coloured frame."""
    n = len(scans)
    side = rng.uniform(32, 42, n) if augment else np.full(n, 38.0)
    centre = SIDE / 2 - 0.5 + rng.uniform(-4, 4, (n, 2)) * (1 if augment else 0.75)
    canvas = ink(enlarge(scans, SIDE, SIDE, side, centre, rng if augment else None), rng if augment else None)
    for picture, colour in zip(canvas, colours, strict=True):
        rgb: np.ndarray = np.array(COLOURS[colour], dtype=np.float32)
        width = 5
        if augment:
            rgb, width = rgb * rng.uniform(0.85, 1.1) + rng.uniform(-10, 10, 3), int(rng.integers(4, 7))
        picture[:width], picture[-width:], picture[:, :width], picture[:, -width:] = rgb, rgb, rgb, rgb
    return np.clip(canvas, 0, 255).astype(np.uint8)


def draw_sheet(scan: np.ndarray, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """A dark sheet (168, 224, 3) uint8 with one small scan (8, 8) in a random place of one of its 3 x 4 tiles."""
    height, width = SHEET
    side = float(rng.uniform(26, 38)) if augment else float(SHEET_SCAN)
    tile = np.array([rng.integers(height // SIDE), rng.integers(width // SIDE)])
    centre = tile * SIDE + rng.uniform(side / 2, SIDE - side / 2, 2) - 0.5
    if augment and rng.random() < 0.5:  # across the tiles' borders too
        centre = rng.uniform(side / 2, np.array(SHEET) - side / 2, 2) - 0.5
    drawn = enlarge(scan[None], height, width, np.array([side]), centre[None], rng if augment else None)
    return np.clip(ink(drawn, rng if augment else None)[0], 0, 255).astype(np.uint8)


def draw_corner(scan: np.ndarray | None, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """What a tile of a sheet looks like, (SIDE, SIDE, 3) uint8: dark, no frame, a small scan anywhere or none."""
    side = rng.uniform(26, 42, 1)
    centre = rng.uniform(side / 2 - 4, SIDE + 4 - side / 2, (1, 2)) - 0.5
    scans = np.zeros((1, 8, 8), np.float32) if scan is None else scan[None]
    drawn = enlarge(scans, SIDE, SIDE, side, centre, rng if augment else None)
    return np.clip(ink(drawn, rng if augment else None)[0], 0, 255).astype(np.uint8)


def describe(digit: int, colour: str | None = None) -> str:
    """A caption, such as "a red 7" or "an 8"."""
    words = f"{colour} {digit}" if colour else f"{digit}"
    return f"an {words}" if words[0] in "o8" else f"a {words}"


class Scene:
    """Pictures with known digits and frame colours, and the questions that can be asked about them."""

    def __init__(self, digits: np.ndarray, colours: list[str], split: str, rng: np.random.Generator, augment: bool):
        self.digits, self.colours, self.rng = [int(digit) for digit in digits], colours, rng
        groups = split_scans(split)
        self.scan_ids = [int(rng.choice(groups[digit])) for digit in self.digits]
        pixels = draw_pictures(load_scans()[0][self.scan_ids], colours, rng, augment)
        self.pictures = [Image.fromarray(picture) for picture in pixels]

    def ask(self, kind: str, colour: str = "red") -> tuple[str, str]:
        """A question of this kind about the scene, in one of its wordings, and its answer."""
        wordings = QUESTIONS[kind]
        question = wordings[int(self.rng.integers(len(wordings)))].format(colour=colour, digit=COUNTED)
        digits, colours = self.digits, self.colours
        answers = {
            "read": lambda: describe(digits[0], colours[0]),
            "digit": lambda: f"{digits[0]}",
            "colour": lambda: colours[0],
            "framed": lambda: f"{digits[colours.index(colour)]}",
            "count": lambda: f"{digits.count(COUNTED)}",
            "list": lambda: ", ".join(map(str, digits)),
            "order": lambda: ", ".join(colours),
            "first": lambda: f"{digits[0]}",
            "last": lambda: f"{digits[-1]}",
            "first_last": lambda: f"{digits[0]} and {digits[-1]}",
        }
        return question, answers[kind]()


def _turns(first: list[dict[str, Any]], turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Messages of a conversation whose first question stands after the pictures in `first`."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        shown = first if number == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _digits(rng: np.random.Generator, n: int, sevens: int | None = None) -> np.ndarray:
    """n random digits, exactly `sevens` of them the counted one if given."""
    if sevens is None:
        return rng.integers(0, 10, n)
    others = np.array([digit for digit in range(10) if digit != COUNTED])
    digits = np.concatenate([np.full(sevens, COUNTED), rng.choice(others, n - sevens)])
    return rng.permutation(digits)


def make_row(task: str, split: str, seed: int, index: int, pictures: int = 1, questions: int = 1) -> dict[str, Any]:
    """One conversation of a task; in the training split its scans are turned, bent and recoloured.

    Args:
        task: `caption` (pictures one by one, each with its caption), `read`, `framed`, `count`, `order`, `first_last`
            or `sheet`.
        pictures: pictures (or frames) in it.
        questions: questions about the same pictures, the task's own and others, in random order.

    Returns:
        `messages` (pictures are PIL images inside the content), `images` (the same pictures, in order, which is how
        TRL knows a vision row), `sub_images` (show the picture as tiles too), `answer` (the first one).

    Raises:
        ValueError: an unknown task or split, or an order of more frames than there are colours.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")
    if task == "order" and pictures > MAX_ORDER:
        raise ValueError(f"an order of {pictures} frames needs as many colours; there are {MAX_ORDER}")
    rng = np.random.default_rng([seed, SPLITS.index(split), sorted(TASKS).index(task), pictures, index])
    augment = split == "train"
    names = list(COLOURS)
    if task == "sheet":
        digit = int(rng.integers(10))
        scan = load_scans()[0][rng.choice(split_scans(split)[digit])]
        sheet = Image.fromarray(draw_sheet(scan, rng, augment))
        question = QUESTIONS["sheet"][int(rng.integers(len(QUESTIONS["sheet"])))]
        messages = _turns([{"type": "image", "image": sheet}], [(question, str(digit))])
        return {"messages": messages, "images": [sheet], "sub_images": True, "answer": str(digit)}

    colours = [str(name) for name in rng.choice(names, pictures)]
    if task == "caption":
        scene = Scene(_digits(rng, pictures), colours, split, rng, augment)
        captions = [describe(digit, colour) for digit, colour in zip(scene.digits, colours, strict=True)]
        for place in np.flatnonzero(rng.random(pictures) < 0.2):  # what the tiles of a sheet look like
            empty = rng.random() < 0.3
            scan = None if empty else load_scans()[0][scene.scan_ids[place]]
            scene.pictures[place] = Image.fromarray(draw_corner(scan, rng, augment))
            captions[place] = "nothing" if empty else describe(scene.digits[place])
        messages = []
        for picture, caption in zip(scene.pictures, captions, strict=True):
            messages.append({"role": "user", "content": [{"type": "image", "image": picture}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": caption}]})
        return {"messages": messages, "images": scene.pictures, "sub_images": False, "answer": captions[0]}

    if task == "framed":  # the asked colours occur once each
        asked = [str(name) for name in rng.permutation(names)[: min(questions, pictures)]]
        if split != "train":
            asked = ["red"]
        rest = [name for name in names if name not in asked]
        colours = [*asked, *(str(name) for name in rng.choice(rest, pictures - len(asked)))]
        colours = [colours[place] for place in rng.permutation(pictures)]
    elif task == "order":
        colours = [str(name) for name in rng.permutation(names)[:pictures]]
    sevens = int(rng.integers(min(pictures, MAX_COUNT) + 1)) if task == "count" else None
    scene = Scene(_digits(rng, pictures, sevens), colours, split, rng, augment)

    if task == "framed":
        turns = [scene.ask("framed", colour) for colour in asked]
    else:
        kinds = ["digit", "colour"] if task == "read" else ["list", "order", "count", "first", "last", "first_last"]
        others = rng.permutation([kind for kind in kinds if kind != task])[: questions - 1]
        turns = [scene.ask(task), *(scene.ask(str(kind)) for kind in others)]
    if questions > 1:
        turns = [turns[place] for place in rng.permutation(len(turns))]
    if task in ("order", "first_last"):
        shown: list[dict[str, Any]] = [{"type": "video", "video": scene.pictures}]
    else:
        shown = [{"type": "image", "image": picture} for picture in scene.pictures]
    return {"messages": _turns(shown, turns), "images": scene.pictures, "sub_images": False, "answer": turns[0][1]}
