"""The small world's pictures: captioned scenes of 32 x 32 pixels, drawn from a seed with Pillow.

    scene = random_scene(random.Random(7))
    draw(scene), caption(scene, random.Random(7))

A scene is a background with one thing on it: a plain shape in a colour, or a figure, which is put together from parts
in colours of their own. What tells one figure from another is its Identity. Luca, the character of the data set, is a
figure with ears; the base model has seen figures, but none with ears and none in two of Luca's colours.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 32  # pixels of a picture
SCALE = 4  # drawn so many times larger and then reduced, for smooth edges

Colour = tuple[int, int, int]  # red, green, blue; 0..255

BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {  # words: above and below the horizon
    "on grass": ((150, 205, 245), (95, 165, 70)),
    "on sand": ((250, 240, 200), (215, 180, 115)),
    "in snow": ((200, 212, 225), (248, 250, 252)),
    "at night": ((22, 26, 60), (60, 60, 72)),
    "by the sea": ((250, 165, 115), (45, 115, 140)),
    "in a room": ((190, 150, 125), (100, 65, 45)),
}
COLOURS: dict[str, Colour] = {
    "red": (220, 30, 40),
    "yellow": (250, 220, 30),
    "blue": (30, 60, 225),
    "purple": (145, 40, 190),
    "pink": (255, 140, 195),
}
SHAPES = ("circle", "square", "triangle")
PLACES = {"on the left": 0.26, "in the middle": 0.5, "on the right": 0.74}  # of the thing's middle, 0 left to 1 right
SIZES = {"small": 0.34, "large": 0.52}  # of a plain shape, as a share of the picture
FIGURE_SIZES = {"small": 0.62, "large": 0.84}  # of a figure's height
HORIZON = 0.66  # from the top
FOOT = 0.92
HEADGEARS = ("hat", "box", "ears")


@dataclass(frozen=True)
class Identity:
    """What stays the same in all pictures of one figure: names of COLOURS, and one of HEADGEARS."""

    headgear: str
    top: str  # the headgear's colour
    head: str
    body: str
    belt: str

    @property
    def colours(self) -> tuple[str, str, str, str]:
        return self.top, self.head, self.body, self.belt


LUCA = Identity("ears", top="red", head="yellow", body="blue", belt="pink")


@dataclass(frozen=True)
class Scene:
    """One picture without its caption."""

    background: str
    what: tuple[str, str] | Identity | None  # one of SHAPES with one of COLOURS, a figure, or nothing
    place: str
    size: str
    dx: float = 0.0  # off the place, as a share of the picture
    dy: float = 0.0
    horizon: float = HORIZON


def random_identity(rng: random.Random, headgears: tuple[str, ...] = ("hat", "box")) -> Identity:
    """Any possible figure with one of the headgears."""
    while True:
        top, head, body, belt = (rng.choice(tuple(COLOURS)) for _ in range(4))
        found = Identity(rng.choice(headgears), top, head, body, belt)
        if is_possible(found):
            return found


def is_possible(who: Identity) -> bool:
    """Whether a figure shares at most one colour with Luca in the same part, and its belt can be seen."""
    alike = sum(ours == theirs for ours, theirs in zip(who.colours, LUCA.colours, strict=True))
    return alike <= 1 and who.body != who.belt


def random_scene(rng: random.Random, what: Identity | tuple[str, str] | None = None) -> Scene:
    """Any scene, or one of the given thing; shapes and figures in equal shares, and a few empty ones."""
    kind = rng.random()
    thing: tuple[str, str] | Identity | None = what
    if thing is None and kind < 0.48:
        thing = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    elif thing is None and kind < 0.96:
        thing = random_identity(rng)
    return jitter(
        Scene(rng.choice(tuple(BACKGROUNDS)), thing, rng.choice(tuple(PLACES)), rng.choice(tuple(SIZES))), rng
    )


def is_held_out(scene: Scene) -> bool:
    """Whether the base model never saw its combination of shape, colour, place and background: one shape in five."""
    if scene.what is None or isinstance(scene.what, Identity):
        return False
    shape, colour = scene.what
    known = ((SHAPES, shape), (COLOURS, colour), (PLACES, scene.place), (BACKGROUNDS, scene.background))
    return sum(list(names).index(name) for names, name in known) % 5 == 0


def jitter(scene: Scene, rng: random.Random) -> Scene:
    """The scene with its thing up to 1 pixel beside its place, and the horizon up to 1 pixel off."""
    dx, dy, horizon = (rng.uniform(-1, 1) / SIDE for _ in range(3))
    return dataclasses.replace(scene, dx=dx, dy=dy, horizon=HORIZON + horizon)


def tags(scene: Scene) -> list[str]:
    """What a full caption says, a tag each: the thing, its place, the background."""
    if scene.what is None:
        return [scene.background]
    thing = "figure" if isinstance(scene.what, Identity) else f"{scene.what[1]} {scene.what[0]}"
    return [f"a {scene.size} {thing}", scene.place, scene.background]


def caption(scene: Scene, rng: random.Random, name: str | None = None) -> str:
    """A caption as a data set might have it: tags in any order, now and then without size or place."""
    found = tags(scene)
    if len(found) == 3:
        if rng.random() < 0.15:
            found[0] = found[0].replace(f"{scene.size} ", "")
        if rng.random() < 0.1:
            del found[1]
    rng.shuffle(found)
    return ", ".join(found if name is None else [name, *found])


def random_name(rng: random.Random) -> str:
    """Two open syllables. The encoders have read such names, of many figures, but never Luca's."""
    while True:
        name = "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        if name != "luca":
            return name


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, SIDE x SIDE pixels."""
    return draw_parts(scene, parts(scene))


def draw_parts(scene: Scene, shown: list[Part]) -> Image.Image:
    """The scene's background with these parts on it, RGB, SIDE x SIDE pixels."""
    side = SIDE * SCALE
    above, below = BACKGROUNDS[scene.background]
    picture = Image.new("RGB", (side, side), above)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, round(side * scene.horizon), side, side), fill=below)
    for _, shape, box, colour in shown:
        draw_shape(pen, shape, tuple(value * side for value in box), colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the picture
Part = tuple[str, str, Box, Colour]  # name, shape, place, colour


def parts(scene: Scene) -> list[Part]:
    """What a scene's thing is drawn from, back to front."""
    if scene.what is None:
        return []
    middle, foot = PLACES[scene.place] + scene.dx, FOOT + scene.dy
    if isinstance(scene.what, Identity):
        return figure_parts(scene.what, middle, foot, FIGURE_SIZES[scene.size])
    shape, colour = scene.what
    size = SIZES[scene.size]
    return [("thing", shape, (middle - size / 2, foot - size, middle + size / 2, foot), COLOURS[colour])]


def figure_parts(who: Identity, middle: float, foot: float, height: float) -> list[Part]:
    """Headgear, head, body and belt of a figure, back to front; the head takes 36% of its height, the body 46%."""
    head, body = height * 0.36, height * 0.46
    half, wide, top, tip = head / 2, height * 0.21, foot - body - head, foot - body - head - height * 0.18
    colour = COLOURS[who.top]
    gear: dict[str, list[Part]] = {
        "hat": [("top", "triangle", around(middle, half * 0.95, tip, top + head * 0.3), colour)],
        "box": [("top", "square", around(middle, half * 0.75, tip + half * 0.1, top + head * 0.3), colour)],
        "ears": [
            ("top", "triangle", around(middle + aside, half * 0.42, tip, top + head * 0.5), colour)
            for aside in (-half * 0.8, half * 0.8)
        ],
    }
    return [
        *gear[who.headgear],
        ("head", "circle", around(middle, half, top, top + head), COLOURS[who.head]),
        ("body", "square", around(middle, wide, foot - body, foot), COLOURS[who.body]),
        ("belt", "square", around(middle, wide, foot - body * 0.62, foot - body * 0.34), COLOURS[who.belt]),
    ]


def around(middle: float, half: float, top: float, bottom: float) -> Box:
    return middle - half, top, middle + half, bottom


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: tuple[float, ...], colour: Colour | int) -> None:
    left, top, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon(((left, bottom), ((left + right) / 2, top), (right, bottom)), fill=colour)
