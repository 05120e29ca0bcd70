"""Procedural people with exact joints: (seed, i) in, image and pose out. Nothing to download.

In order: colours, a person, a pose, the posed skeleton in 3D, its drawing, the backdrop.
Axes: x right, y down, z to the viewer. A body unit is the standing height; angles are in degrees.
"""

import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

import keypoints
from data import ImageDataset

SUPERSAMPLE = 4                 # drawn 4 times larger, then averaged down
Colour = tuple[int, int, int]
Vec = tuple[float, float, float]
Mat = tuple[Vec, Vec, Vec]


def _hex(codes: str) -> list[Colour]:
    return [tuple(bytes.fromhex(code)) for code in codes.split()]


SKINS = _hex("ffe0c7 f9cfae f0b98d e0a070 c98352 a9673d 8a5030 6b3d26 542f20")
HAIRS = _hex("2a2228 3d2a24 5b3a29 8a5532 b9763a e3b65c f0d79a c4532d 8d2f3f 9a9aa6 e9e4de 4a5fa8 "
             "c76b98")
# Backdrops are pale and clothes strong, so that a limb stands out from them even at 64 x 64.
# One palette: sky, far shape, near shape, ground | tops | bottoms (dark or denim) | shoes and hats.
PALETTES = [[_hex(codes) for codes in row.split("|")] for row in """\
cdeaf2 b5dccb 9ccfae bfe0a8|e8564a f2b134 fff4e0 3a7ca5|2f4858 4a5d7e 6b4a3a|d1495b fff4e0 2f4858
fde6cf f7c9a9 eeb08d f5dcb0|2a9d8f e76f51 264653 fffaf0|264653 5a4a6a 3d5a80|e76f51 8d3b2e 264653
e3dff5 c9c1ea b2a7df d8cdea|f28482 5f4bb6 ffd166 fffdf7|3a3266 5d576b 2d3047|ffd166 f28482 2d3047
d9f0e6 b4ddcf 93c9b9 e8e3c0|ee6c4d 1f7a8c f4d35e f9f7f0|293241 3d5a80 704d3c|ee6c4d f9f7f0 293241
ffe3e6 f9c6cd f2adb8 fbe9d7|457b9d d62839 1d3557 fff8f0|1d3557 5c4b51 44608a|d62839 fff8f0 3c2a3e
fbf3d9 f0dfae e3cd8f e9dcc0|588157 bc4749 3a5a40 386fa4|344e41 6b4226 4b5a75|bc4749 f2e8cf 3b2c24
dbe7f7 bccfe9 a3bbdd eef3f8|d1495b edae49 00798c 30638e|2e4057 66545e 4f3b4f|edae49 d1495b 243447
2f3a62 3d4a78 4a5a8a 56688f|ff9f68 ffe08a f4f1ff e4688a|8f7fc4 c8553d 7fb7be|ffe08a ff9f68 f4f1ff
""".splitlines()]
WHITE, INK, ROSE = (255, 255, 255), (44, 34, 48), (240, 104, 112)
EDGE = 0.64                     # brightness of an outline, times that of its shape


def _shade(colour: Colour, light: float) -> Colour:
    return (int(colour[0] * light), int(colour[1] * light), int(colour[2] * light))


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    return _shade(_lerp(a, b, t), 1)


HAIR_STYLES = ("short", "short", "bob", "long", "ponytail", "pigtails", "bun", "afro", "curly",
               "bald")
EARS_COVERED, ONE_MASS = ("bob", "long", "afro", "curly"), ("afro", "curly")


class _Person:
    """Proportions in body units, looks as colours and the names of styles."""

    def __init__(self, rng: random.Random, palette: list[list[Colour]]):
        (_, _, near, _), tops, bottoms, accents = palette
        self.crate = _mix(near, (120, 80, 50), 0.45)            # the box to sit on
        self.head = rng.uniform(0.118, 0.178)                   # radius: 0.18 chibi, 0.12 adult
        body = 1 - 2 * self.head
        self.torso, self.leg = 0.40 * body, 0.29 * body         # hips to neck; thigh, and shank
        self.skirt = rng.random() < 0.28
        motifs = ("plain", "stripes", "stripes", "badge", "jacket",
                  "plain" if self.skirt else "overalls")
        self.motif = rng.choice(motifs)
        self.skin, self.bottom = rng.choice(SKINS), rng.choice(bottoms)
        if self.motif == "overalls":
            tops = [_mix(colour, WHITE, 0.45) for colour in tops]
        apart = [top for top in tops
                 if sum(abs(x - y) for x, y in zip(top, self.skin, strict=True)) > 110]
        self.top = rng.choice(apart or tops)                    # cloth that differs from the skin
        if self.skirt and rng.random() < 0.55:
            self.bottom = self.top                              # a dress
        elif self.skirt:
            self.bottom = rng.choice([colour for colour in tops if colour != self.top])
        self.style = rng.choice(HAIR_STYLES)
        self.hat = ""
        if self.style != "afro" and rng.random() < 0.2:
            self.hat = rng.choice(("cap", "beanie", "sunhat"))
        self.arm = rng.uniform(0.225, 0.245) * body             # upper arm, and forearm
        self.shoulder = rng.uniform(0.125, 0.16) * body         # half the width between the joints
        self.hip = rng.uniform(0.07, 0.085) * body              # the same
        self.girth = rng.uniform(0.9, 1.22) * body              # multiplies every thickness
        self.hair, self.fringe = rng.choice(HAIRS), rng.choice(HAIRLINES)
        beards = 15 if self.style in ("short", "bald") else 0
        self.face = rng.choices(("plain", "glasses", "beard"), (70, 15, beards))[0]
        # How much of the limb is covered: 0 none, 1 to the elbow or knee, 2 to the wrist or ankle.
        self.sleeve = 2.0 if self.motif == "jacket" else rng.choice((0.0, 0.6, 0.6, 2.0, 2.0))
        self.trouser = rng.choice((0.0, 0.0, 2.0) if self.skirt else (0.75, 1.3, 2.0, 2.0, 2.0))
        self.belt, self.scarf = rng.random() < 0.3, rng.random() < 0.15
        self.shoe, self.accent = rng.choice(accents), rng.choice(accents)


# Arm: flexion (0 hangs, 90 forward, 180 up), abduction (90 sideways), turn (of the forearm: 0
# forward, 90 inward, -90 outward), elbow. Leg: the same with the knee; turn 90: the foot inward.
ARM_LIMITS = ((-50, 170), (-5, 172), (-90, 90), (0, 145))
LEG_LIMITS = ((-35, 118), (-6, 60), (-25, 85), (0, 150))
STAND, HANG, UP = (0, 5, 0, 3), (4, 12, 10, 14), (0, 163, -30, 12)
# name: left arm, right arm, left leg, right leg, (lean forward, roll sideways), lift off the ground
ARCHETYPES = {
    "stand": (HANG, HANG, STAND, STAND, (0, 0), 0),
    "wave": (HANG, (0, 105, -85, 75), STAND, STAND, (0, 3), 0),
    "walk": ((36, 8, 5, 25), (-32, 8, 5, 22), (-22, 2, 0, 24), (30, 2, 0, 6), (4, 0), 0),
    "run": ((62, 10, 20, 95), (-46, 12, 10, 92), (-24, 2, 0, 82), (66, 3, 0, 66), (16, 0), 0.04),
    "star": ((0, 128, -10, 8), (0, 128, -10, 8), (0, 32, 0, 8), (0, 32, 0, 8), (0, 0), 0.12),
    "leap": ((30, 120, -20, 15), (-20, 95, 0, 15), (-32, 4, 0, 60), (72, 6, 0, 18), (8, 0), 0.13),
    "tuck": (UP, UP, (78, 16, 0, 105), (70, 16, 0, 112), (8, 0), 0.16),
    "dance": ((0, 150, -60, 45), (0, 52, 80, 95), STAND, (45, 38, 45, 95), (0, 8), 0),
    "twirl": ((60, 110, 30, 40), (20, 70, 60, 50), (0, 4, 0, 6), (-12, 22, 0, 55), (-4, -8), 0),
    "box": ((28, 8, 20, 40), (24, 10, 20, 45), (86, 8, 0, 86), (84, 8, 0, 80), (2, 0), 0),
    "floor": ((-30, 22, 0, 6), (-28, 24, 0, 8), (86, 12, 0, 6), (98, 10, 0, 55), (-12, 0), 0),
    "lotus": ((40, 22, 10, 30), (40, 22, 10, 30), (84, 48, 76, 118), (84, 48, 70, 112), (3, 0), 0),
    "heels": ((34, 6, 15, 38), (34, 6, 15, 38), (72, 8, 0, 145), (72, 8, 0, 145), (4, 0), 0),
    "kneel": ((42, 6, 30, 52), HANG, (86, 6, 0, 88), (2, 4, 0, 92), (5, 0), 0),
    "crouch": ((62, 10, 10, 30), (60, 12, 10, 42), (108, 22, 0, 128), (104, 22, 0, 126),
               (24, 0), 0),
    "cheer": (UP, UP, (0, 9, 0, 3), (0, 9, 0, 3), (-4, 0), 0),
    "point": (HANG, (86, 8, 0, 4), STAND, (8, 6, 0, 6), (2, 0), 0),
    "show": ((-10, 46, 75, 98), (0, 92, 0, 6), (0, 8, 0, 3), (0, 8, 0, 3), (0, 4), 0),
    "tee": ((0, 89, 0, 2), (0, 89, 0, 2), STAND, STAND, (0, 0), 0),
    "kick": ((40, 42, 10, 25), (-35, 45, 0, 20), STAND, (78, 6, 0, 12), (-12, 0), 0),
    "hips": ((-12, 46, 75, 98), (-12, 46, 75, 98), (0, 10, 0, 3), (0, 10, 0, 3), (0, 0), 0),
    "tilt": ((0, 158, -20, 20), (-10, 44, 75, 96), (0, 12, 0, 2), (0, 12, 0, 14), (0, 20), 0),
    "think": ((24, 4, 80, 92), (52, 8, 40, 132), STAND, STAND, (3, 0), 0),
    "tree": ((0, 166, 10, 30), (0, 166, 10, 30), STAND, (52, 50, 80, 122), (0, 0), 0),
    "swallow": ((10, 92, 0, 4), (10, 92, 0, 4), (8, 2, 0, 10), (-35, 4, 0, 10), (42, 0), 0),
    "muscle": ((0, 90, -88, 105), (0, 90, -88, 105), (0, 12, 0, 3), (0, 12, 0, 3), (0, 0), 0),
    "bow": ((-20, 12, 0, 10), (40, 6, 60, 80), STAND, STAND, (38, 0), 0),
    "lunge": ((95, 20, 0, 6), (-40, 20, 0, 20), (62, 6, 0, 66), (-26, 4, 0, 12), (6, 0), 0),
}
YAWS = (0, 0, 0, 0, 0, 38, -38, 38, -38, 65, -65, 88, -88, 88, -88, 145, -145, 180)
RANDOM_POSES = 0.34             # share of images with limbs drawn from the whole human range
CLOSE_UPS = 0.05                # share of images cropped so that joints leave the frame


class _Pose:
    """Angles in degrees; arms and legs are (left, right) rows as in ARM_LIMITS and LEG_LIMITS."""

    def __init__(self, rng: random.Random):
        name = rng.choice(tuple(ARCHETYPES))
        *limbs, (lean, roll), self.lift = ARCHETYPES[name]      # lift in body units
        self.box, jitter = name == "box", 6                     # box: the person sits on one
        if rng.random() < RANDOM_POSES:
            self.box, jitter = False, 0
            limbs = [(rng.uniform(-45, 110), rng.uniform(0, 150), rng.uniform(-80, 80),
                      rng.triangular(0, 140, 20)) for _ in "LR"]
            limbs += [(rng.triangular(-35, 100, 0), rng.triangular(0, 50, 5), rng.uniform(-20, 30),
                       rng.triangular(0, 130, 5)) for _ in "LR"]
            lean, roll, self.lift = rng.gauss(4, 12), rng.gauss(0, 9), rng.choice((0.0, 0.0, 0.1))
        if rng.random() < 0.5:
            limbs, roll = [limbs[k] for k in (1, 0, 3, 2)], -roll
        all_limits = (ARM_LIMITS, ARM_LIMITS, LEG_LIMITS, LEG_LIMITS)
        limbs = [[min(high, max(low, rng.gauss(angle, jitter)))
                  for angle, (low, high) in zip(limb, limits, strict=True)]
                 for limb, limits in zip(limbs, all_limits, strict=True)]
        self.arms, self.legs = limbs[:2], limbs[2:]
        self.yaw = rng.choice(YAWS) + rng.gauss(0, 7)           # 0 faces us, 90 right, 180 away
        self.lean, self.roll = rng.gauss(lean, 2.5), rng.gauss(roll, 2)
        # yaw, pitch down, roll
        self.head = rng.gauss(0, 12), rng.gauss(-0.5 * lean, 6), rng.gauss(-0.4 * roll, 6)


def _rotation(axis: str, degrees: float) -> Mat:
    """About x: down turns to the viewer; about y: the viewer's side to the right; z: down to right.
    """
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return {"x": ((1, 0, 0), (0, c, -s), (0, s, c)), "y": ((c, 0, s), (0, 1, 0), (-s, 0, c)),
            "z": ((c, s, 0), (-s, c, 0), (0, 0, 1))}[axis]


def _apply(m: Mat, v: Vec, origin: Vec = (0.0, 0.0, 0.0), scale: float = 1.0) -> Vec:
    """origin + scale * m v"""
    (a, b, c), (d, e, f), (g, h, i) = m
    (x, y, z), (ox, oy, oz) = v, origin
    return (ox + (a * x + b * y + c * z) * scale, oy + (d * x + e * y + f * z) * scale,
            oz + (g * x + h * y + i * z) * scale)


def _matmul(*matrices: Mat) -> Mat:
    *others, product = matrices
    for m in reversed(others):
        columns = [_apply(m, column) for column in zip(*product, strict=True)]
        product = tuple(zip(*columns, strict=True))
    return product


def _lerp(a: Vec, b: Vec, t: float) -> Vec:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


SIDES = ("left", "right")
FACE = {                        # from the head's middle, in its radii
    "nose": (0.0, 0.24, 0.97), "eye_left": (0.40, 0.04, 0.82), "eye_right": (-0.40, 0.04, 0.82),
    "ear_left": (0.98, 0.12, -0.06), "ear_right": (-0.98, 0.12, -0.06)}
# Joints from the body outwards, radii in girths, an offset to the depth: hems hang over legs.
LIMB_PARTS = {"arm": (("shoulder", "elbow", "wrist"), (0.05, 0.043, 0.035), 0.02),
              "leg": (("hip", "knee", "ankle"), (0.073, 0.056, 0.042), -0.09)}


def _limb(frame: Mat, root: Vec, length: float, angles: list[float], side: int, bend: int,
          toe: float = 0) -> list[Vec]:
    """Root, middle and end joint, and the toe, `toe` from the end; side is +1 left, -1 right; bend
    +1 elbow, -1 knee."""
    flexion, abduction, turn, fold = angles
    frame = _matmul(frame, _rotation("x", flexion), _rotation("z", side * abduction))
    turn, fold = math.radians(turn), math.radians(fold)
    sin_turn, cos_turn = math.sin(turn), math.cos(turn)
    sin_fold, cos_fold = math.sin(fold), math.cos(fold)
    middle = _apply(frame, (0, length, 0), root)
    along = (-side * sin_turn * sin_fold, cos_fold, bend * cos_turn * sin_fold)
    end = _apply(frame, along, middle, length)
    toes = (-side * sin_turn * cos_fold * bend, -bend * sin_fold, cos_turn * cos_fold)
    return [root, middle, end, _apply(frame, toes, end, toe)]


def _skeleton(person: _Person, pose: _Pose) -> tuple[dict[str, Vec], Mat, Mat, Mat]:
    """Points in body units from the pelvis, and the matrices that turn head, chest and hips."""
    yaw = _rotation("y", pose.yaw)
    chest = _matmul(yaw, _rotation("z", pose.roll), _rotation("x", -pose.lean))
    turn, nod, tilt = pose.head
    head = _matmul(chest, _rotation("y", turn), _rotation("z", tilt), _rotation("x", -nod))
    points = {"pelvis": (0.0, 0.0, 0.0), "neck": _apply(chest, (0, -person.torso, 0))}
    points["head"] = _apply(head, (0, -0.93 * person.head, 0.04 * person.head), points["neck"])
    points |= {name: _apply(head, offset, points["head"], person.head)
               for name, offset in FACE.items()}
    for side, sign, arm, leg in zip(SIDES, (1, -1), pose.arms, pose.legs, strict=True):
        shoulder = _apply(chest, (sign * person.shoulder, -0.86 * person.torso, 0))
        hip = _apply(yaw, (sign * person.hip, 0, 0))
        joints = _limb(chest, shoulder, person.arm, arm, sign, 1)[:3]
        joints += _limb(yaw, hip, person.leg, leg, sign, -1, 0.12 * person.girth)
        names = (*LIMB_PARTS["arm"][0], *LIMB_PARTS["leg"][0], "toe")
        points |= {f"{name}_{side}": point for name, point in zip(names, joints, strict=True)}
    return points, head, chest, yaw


def _circle(start: int, stop: int, step: int) -> list[tuple[float, float]]:
    angles = [math.radians(t) for t in range(start, stop, step)]
    return [(math.cos(t), math.sin(t)) for t in angles]


def _edge(polar: Callable[[int], float]) -> list[Vec]:
    """Closed line [24] on a unit sphere round z: its angle from z, by the angle clockwise from the
    top (-180..165)."""
    angles = [math.radians(polar((t + 180) % 360 - 180)) for t in range(0, 360, 15)]
    return [(math.sin(a) * s, math.sin(a) * -c, math.cos(a))
            for a, (c, s) in zip(angles, CIRCLE, strict=True)]


ARC, RING, CIRCLE = _circle(-90, 91, 30), _circle(0, 360, 30), _circle(0, 360, 15)
HAIRLINES = [
    _edge(lambda t, fringe=fringe: fringe(t) if abs(t) <= 60 else
          56 + 32 * min(1.0, (abs(t) - 60) / 50))
    for fringe in (lambda t: 40, lambda t: 36 + 9 * (t // 15 % 2), lambda t: 50 - 0.28 * t,
                   lambda t: 58 - 0.3 * abs(t), lambda t: 44 + 0.3 * t)]
HAT, BEARD = _edge(lambda t: 88), _edge(lambda t: 62 if abs(t) > 40 else 40)
# Radius and shift forward, in head radii, and shade.
BRIMS = {"cap": (0.8, 0.8, 0.75), "sunhat": (1.75, 0.0, 0.8)}
TRUNK = ("shoulder_left", "shoulder_right", "hip_right", "hip_left")
# Hair off the head: circles (x, y, z, radius) in head radii; 1 is a ball, 2 a capsule, more a blob.
TRESSES = {
    "long": [[(-0.62, 0, -0.4, 0.5), (0.62, 0, -0.4, 0.5),
              (-0.72, 1.55, -0.4, 0.28), (0.72, 1.55, -0.4, 0.28)]],
    "bob": [[(-0.78, 0, -0.2, 0.4), (0.78, 0, -0.2, 0.4),
             (-0.78, 0.62, -0.15, 0.4), (0.78, 0.62, -0.15, 0.4)]],
    "ponytail": [[(0, -0.5, -0.95, 0.26), (0, 0.9, -1.55, 0.2)]],
    "pigtails": [[(0.95 * x, 0, -0.25, 0.24), (1.4 * x, 0.95, -0.3, 0.17)] for x in (-1, 1)],
    "bun": [[(0, -1.08, -0.35, 0.42)]],
    "afro": [[(0, -0.2, -0.2, 1.36)]],
    "curly": [[(0.98 * math.cos(t), 0.98 * math.sin(t) + 0.05, -0.15, 0.36)]
              for t in (math.radians(-200 + 220 * k / 9) for k in range(10))],
}
EYE_SHOWS, EAR_SHOWS = 0.06, -0.35      # if so many head radii in front of the head's middle


class _Figure:
    """A posed person as the camera sees it, in pixels of the big canvas; z too, towards the viewer.
    """

    def __init__(self, rng: random.Random, palette: list[list[Colour]], pixels: int):
        """Tilts the camera a little down, so that depth shows; fits the figure into the frame."""
        self.image = Image.new("RGB", (pixels, pixels))
        self.pen = ImageDraw.Draw(self.image)
        self.person, self.pose = person, pose = _Person(rng, palette), _Pose(rng)
        points, head, chest, yaw = _skeleton(person, pose)
        lowest = max(p[1] for p in points.values())
        self.ground = lowest + 0.05 * person.girth + pose.lift          # body units, untilted
        points["shadow"] = (0.0, self.ground, 0.0)
        camera = _rotation("x", -rng.uniform(6, 17))
        self.head, self.chest, self.view = (_matmul(camera, m) for m in (head, chest, yaw))
        points = {name: _apply(camera, p) for name, p in points.items()}
        reach = [(p, 1.25 * person.head if name == "head" else 0.07 * person.girth)
                 for name, p in points.items()]
        (x0, x1), (y0, y1) = ((min(p[k] - r for p, r in reach), max(p[k] + r for p, r in reach))
                              for k in (0, 1))
        scale = min(rng.uniform(0.7, 0.95) / (y1 - y0), 0.95 / (x1 - x0), 1.12)
        if rng.random() < CLOSE_UPS:
            scale *= rng.uniform(1.4, 1.9)
            left, top = 0.5 - scale * (x0 + x1) / 2, rng.uniform(0.03, 0.1) - scale * y0
        else:
            left = rng.uniform(0.02, 0.98 - scale * (x1 - x0)) - scale * x0
            highest = max(0.02, min(0.16, 0.97 - scale * (y1 - y0)))
            top = 1 - scale * y1 - rng.uniform(0.02, highest)
        scale, left, top = scale * pixels, left * pixels, top * pixels
        self.scale, self.girth, self.radius = scale, person.girth * scale, person.head * scale
        self.line = 0.011 * scale               # width of the outlines
        # keypoints.JOINTS, and head, neck, pelvis, toe_left, toe_right, shadow
        self.points = {name: (left + scale * x, top + scale * y, scale * z)
                       for name, (x, y, z) in points.items()}

    def limb(self, kind: str, side: str) -> list[Vec]:
        return [self.points[f"{name}_{side}"] for name in LIMB_PARTS[kind][0]]

    def limb_depth(self, kind: str, side: str) -> float:
        """The limb is drawn before the trunk where it is below 0."""
        a, b, c = self.limb(kind, side)
        return (a[2] + 2 * b[2] + c[2]) / 4 + LIMB_PARTS[kind][2] * self.scale

    def on_head(self, x: float, y: float, z: float) -> Vec:
        """A place in head radii from the head's middle, along its own axes."""
        return _apply(self.head, (x, y, z), self.points["head"], self.radius)

    def facing(self, p: Vec) -> float:
        """How far p lies in front of the middle of the head, in head radii."""
        return (p[2] - self.points["head"][2]) / self.radius

    def covered(self, name: str) -> bool:
        """Is this joint hidden: on a face that looks away, or on a limb behind the trunk?"""
        p, (kind, _, side) = self.points[name], name.partition("_")
        if kind in ("nose", "eye", "ear"):
            return self.facing(p) <= (EAR_SHOWS if kind == "ear" else EYE_SHOWS)
        limb = next(limb for limb, (joints, *_) in LIMB_PARTS.items() if kind in joints)
        if kind in ("shoulder", "hip") or self.limb_depth(limb, side) >= 0:
            return False
        trunk = [self.points[corner] for corner in TRUNK]
        turns = {(b[0] - a[0]) * (p[1] - a[1]) > (b[1] - a[1]) * (p[0] - a[0])
                 for a, b in zip(trunk, trunk[1:] + trunk[:1], strict=True)}
        return len(turns) == 1                              # inside the quadrilateral

    def cap(self, centre: Vec, radius: float, tilt: float,
            edge: list[Vec]) -> list[tuple[float, float]]:
        """The visible part of a cap of a sphere with the border `edge`; its axis is `tilt` degrees
        below the nose."""
        m = _matmul(self.head, _rotation("x", -tilt))
        rim = [_apply(m, v) for v in edge]
        first = 1 + max((k for k, p in enumerate(rim) if p[2] < 0), default=-1)
        seen = [p for p in rim[first:] + rim[:first] if p[2] >= 0]
        if m[2][2] < -0.85 or not seen:
            return []
        if len(seen) < len(rim):        # close it along the sphere's outline, on the axis' side
            start, end, axis = (math.atan2(y, x)
                                for x, y in (seen[-1][:2], seen[0][:2], (m[0][2], m[1][2])))
            turn = (end - start) % math.tau
            if (axis - start) % math.tau > turn:
                turn -= math.tau
            arc = [start + turn * t / 12 for t in range(13)]
            seen += [(math.cos(t), math.sin(t), 0.0) for t in arc]
        return [(centre[0] + radius * x, centre[1] + radius * y) for x, y, _ in seen]

    # Outlined shapes.

    def polygon(self, points: list, colour: Colour) -> None:
        if len(points) > 2:
            self.pen.polygon([p[:2] for p in points], fill=colour)

    def disc(self, p: Vec, rx: float, colour: Colour, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self.pen.ellipse((p[0] - rx, p[1] - ry, p[0] + rx, p[1] + ry), fill=colour)

    def ball(self, p: Vec, r: float, colour: Colour) -> None:
        self.disc(p, r + self.line, _shade(colour, EDGE))
        self.disc(p, r, colour)

    def shape(self, points: list, outline: list, colour: Colour) -> None:
        self.pen.line(outline, fill=_shade(colour, EDGE), width=round(2 * self.line))
        self.pen.polygon(points, fill=colour)

    def capsule(self, a: Vec, b: Vec, ra: float, rb: float, colour: Colour) -> None:
        """A tapered limb; no outline at its start, where it joins its parent."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = math.hypot(dx, dy) or 1.0
        bx, by, ax, ay = rb * dx / length, rb * dy / length, ra * dx / length, ra * dy / length
        points = [(b[0] + c * bx - s * by, b[1] + c * by + s * bx) for c, s in ARC]
        points += [(a[0] - c * ax + s * ay, a[1] - c * ay - s * ax) for c, s in ARC]
        self.shape(points, points[-1:] + points[:len(ARC) + 1], colour)

    def blob(self, circles: list[tuple[Vec, float]], colour: Colour) -> None:
        """Convex hull of circles (centre, radius), by the monotone chain."""
        points = sorted([(p[0] + r * c, p[1] + r * s) for p, r in circles for c, s in RING])
        hull = []
        for order in (points, points[::-1]):
            chain = []
            for x, y in order:
                while len(chain) > 1:
                    (ax, ay), (bx, by) = chain[-2:]
                    if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                        break
                    chain.pop()
                chain.append((x, y))
            hull += chain[:-1]
        self.shape(hull, hull + hull[:1], colour)

    def draw(self) -> None:
        """Draws the parts from far to near."""
        head_z, unit, style = self.points["head"][2], self.scale, self.person.style
        depth = {"torso": 0.0, "head": head_z + 0.4 * self.radius}
        if style in TRESSES:            # in front of the trunk when the back shows, else behind it
            behind = 0.5 if style in ("bun", "pigtails") else 1
            depth["tresses"] = head_z - behind * self.radius * self.head[2][2]
        for kind, side in ((kind, side) for kind in LIMB_PARTS for side in SIDES):
            depth[f"{kind}_{side}"] = self.limb_depth(kind, side)
        if self.person.skirt:
            depth["skirt"] = max(depth["leg_left"], depth["leg_right"]) + 0.001 * unit
        if self.pose.box:
            depth["box"] = -0.08 * unit
        for part in sorted(depth, key=depth.get):
            kind, *side = part.split("_")
            if kind in LIMB_PARTS:
                is_far = depth[part] < -0.05 * unit and abs(self.chest[2][2]) < 0.75
                self.draw_limb(kind, *side, 0.88 if is_far else 1.0)
            else:
                getattr(self, f"draw_{kind}")()

    def draw_limb(self, kind: str, side: str, light: float) -> None:
        """Two tapered capsules and a hand or shoe, the farther first; cloth covers `cover` segments
        of the limb."""
        person, g = self.person, self.girth
        (a, b, c), (ra, rb, rc) = self.limb(kind, side), (r * g for r in LIMB_PARTS[kind][1])
        skin = _shade(person.skin, light)
        if kind == "arm":
            cloth, cover = _shade(person.top, light * 0.95), person.sleeve
            hand = _lerp(b, c, 1.16)
            end_first, draw_end = hand[2] < b[2], partial(self.ball, hand, 0.043 * g, skin)
        else:
            cloth, cover = _shade(person.bottom, light), person.trouser
            if person.skirt:
                cloth = _mix(cloth, WHITE, 0.55)                        # tights
            toe, shoe = self.points[f"toe_{side}"], _shade(person.shoe, light)
            heel, end_first = _lerp(c, toe, -0.12), toe[2] < c[2]
            draw_end = partial(self.capsule, heel, toe, 0.05 * g, 0.043 * g, shoe)
        if end_first:
            draw_end()
        segments = [(a, b, ra, rb, cover), (b, c, rb, rc, cover - 1)]
        for start, end, r0, r1, covered in segments[::-1] if c[2] < a[2] - 0.5 * ra else segments:
            if covered < 1:
                self.capsule(start, end, r0, r1, skin)
            if covered > 0:
                t = min(covered, 1.0)
                hem = 1.14 * (r0 + (r1 - r0) * t)
                self.capsule(start, _lerp(start, end, t), 1.12 * r0, hem, cloth)
        if not end_first:
            draw_end()

    def draw_skirt(self) -> None:
        circles = [(_lerp(self.points["pelvis"], self.points["neck"], 0.3), 0.07 * self.girth)]
        for hip, knee, _ in (self.limb("leg", side) for side in SIDES):
            circles += [(hip, 0.085 * self.girth), (_lerp(hip, knee, 0.48), 0.1 * self.girth)]
        self.blob(circles, self.person.bottom)

    def draw_torso(self) -> None:
        person, g = self.person, self.girth
        pelvis, neck = self.points["pelvis"], self.points["neck"]
        hips, shoulders = ([self.points[f"{name}_{side}"] for side in SIDES]
                           for name in ("hip", "shoulder"))
        self.capsule(self.points["head"], neck, 0.055 * g, 0.06 * g, _shade(person.skin, 0.88))
        if not person.skirt:
            self.blob([(hip, 0.078 * g) for hip in hips], person.bottom)
        lower = [(_lerp(hip, _lerp(pelvis, neck, 0.1), 0.45), 0.078 * g) for hip in hips]
        upper = [(shoulder, 0.056 * g) for shoulder in shoulders]
        self.blob(upper + lower, person.top)

        spine = math.hypot(neck[0] - pelvis[0], neck[1] - pelvis[1]) or 1.0
        # A unit vector across the spine, in the image, and the half widths.
        ux, uy = -(neck[1] - pelvis[1]) / spine, (neck[0] - pelvis[0]) / spine
        low, high = (abs((a[0] - b[0]) * ux + (a[1] - b[1]) * uy) / 2 + r - self.line * 0.3
                     for (a, r), (b, _) in (lower, upper))

        def band(t0: float, t1: float, colour: Colour) -> None:
            """A stripe square to the spine, from height t0 to t1 (0 pelvis, 1 neck)."""
            corners = []
            for t, sign in ((t0, -1), (t0, 1), (t1, 1), (t1, -1)):
                x, y, _ = _lerp(pelvis, neck, t)
                w = sign * (low + (high - low) * min(1.0, t / 0.86))
                corners.append((x + w * ux, y + w * uy))
            self.polygon(corners, colour)

        def at(t: float, x: float) -> Vec:
            """A place on the front of the trunk: height t, x across in half widths."""
            offset = (0.95 * x * person.shoulder * self.scale, 0, 0.1 * g * math.sqrt(1 - x * x))
            return _apply(self.chest, offset, _lerp(pelvis, neck, t))

        front = self.chest[2][2]                # 1 faces the viewer, -1 shows the back
        if person.motif == "stripes":
            pale = _mix(person.top, WHITE, 0.7) if sum(person.top) < 600 else person.accent
            for t in (0.2, 0.44, 0.68):
                band(t, t + 0.11, pale)
        elif person.motif == "jacket" and front > 0.4:
            shirt = _mix(person.accent, WHITE, 0.75)
            self.polygon([at(0.92, -0.4), at(0.92, 0.4), at(0.04, 0.22), at(0.04, -0.22)], shirt)
        elif person.motif == "overalls":
            band(0.02, 0.3, person.bottom)
            for x in (-0.5, 0.5):
                strap = [at(0.3, x)[:2], at(0.93, x)[:2]]
                self.pen.line(strap, fill=person.bottom, width=int(0.05 * g) + 1)
            if front > 0.4:
                bib = [at(0.7, -0.55), at(0.7, 0.55), at(0.1, 0.6), at(0.1, -0.6)]
                self.polygon(bib, person.bottom)
                self.disc(at(0.47, 0.0), 0.035 * g, person.accent)
        elif person.motif == "badge" and front > 0.5:
            self.disc(at(0.55, 0.0), 0.062 * g, WHITE)
            self.disc(at(0.55, 0.0), 0.042 * g, person.accent)
        if person.belt:
            band(0.06, 0.15, _shade(person.accent, 0.8))
        if person.scarf:
            self.capsule(at(0.93, -0.5), at(0.93, 0.5), 0.05 * g, 0.05 * g, person.accent)

    def draw_tresses(self) -> None:
        colour = _shade(self.person.hair, 1 if self.person.style in ONE_MASS else 0.9)
        for spots in TRESSES[self.person.style]:
            circles = [(self.on_head(x, y, z), r * self.radius) for x, y, z, r in spots]
            if len(circles) > 2:
                self.blob(circles, colour)
            elif len(circles) == 2:
                (a, ra), (b, rb) = circles
                self.capsule(a, b, ra, rb, colour)
            else:
                self.ball(*circles[0], colour)

    def draw_head(self) -> None:
        person, r, head = self.person, self.radius, self.points["head"]
        self.ball(head, r, person.skin)
        if person.style != "bald":
            draw = self.disc if person.style in ONE_MASS else self.ball     # no outline in a mass
            draw(self.on_head(0, -0.07, -0.03), 1.04 * r, person.hair)
            shine = self.on_head(-0.3, -0.78, 0.2)
            if self.facing(shine) > 0:
                self.disc(shine, 0.22 * r, _mix(person.hair, WHITE, 0.22), 0.1 * r)
            self.polygon(self.cap(head, r, 12, person.fringe), person.skin)
        for ear in (self.points["ear_left"], self.points["ear_right"]):
            if person.style not in EARS_COVERED and self.facing(ear) > EAR_SHOWS:
                self.disc(ear, 0.2 * r, _shade(person.skin, 0.8))
                self.disc(ear, 0.15 * r, person.skin)
        self.draw_face()
        if person.hat:
            self.draw_hat()

    def draw_face(self) -> None:
        skin, r = self.person.skin, self.radius
        for x in (-0.58, 0.58):
            cheek = self.on_head(x, 0.38, math.sqrt(1 - x * x - 0.38 * 0.38))
            if self.facing(cheek) > 0.25:
                width = 0.17 * r * max(0.5, self.facing(cheek))
                self.disc(cheek, width, _mix(skin, ROSE, 0.34), 0.13 * r)
        if self.person.face == "beard":
            self.polygon(self.cap(self.points["head"], 1.01 * r, 62, BEARD), self.person.hair)
        x, y, _ = mouth = self.on_head(0.0, 0.55, math.sqrt(1 - 0.55 * 0.55))
        if self.facing(mouth) > 0.1:
            w, lips = 0.26 * r * self.facing(mouth) + 0.05 * r, _mix(skin, (120, 20, 40), 0.72)
            self.pen.chord((x - w, y - 0.2 * r, x + w, y + 0.14 * r), 12, 168, fill=lips)
        if self.facing(self.points["nose"]) > EYE_SHOWS:
            self.disc(self.points["nose"], 0.085 * r, _mix(skin, (150, 50, 40), 0.36), 0.07 * r)
        for eye in (self.points["eye_left"], self.points["eye_right"]):
            if self.facing(eye) > EYE_SHOWS:
                w = 0.125 * r * (0.55 + 0.45 * self.facing(eye))
                if self.person.face == "glasses":
                    self.disc(eye, 2.3 * w, self.person.accent, 0.27 * r)
                    self.disc(eye, 1.75 * w, _mix(skin, WHITE, 0.55), 0.2 * r)
                elif sum(skin) < 400:
                    self.disc(eye, 1.35 * w, WHITE, 0.21 * r)       # ink alone is lost in dark skin
                self.disc(eye, w, INK, 0.17 * r)
                self.disc((eye[0] + 0.25 * w, eye[1] - 0.07 * r, 0), 0.4 * w, WHITE)

    def draw_hat(self) -> None:
        r, colour, hat = self.radius, self.person.accent, self.person.hat
        crown = self.on_head(0, -0.42, -0.06)
        shapes = [(self.cap(crown, 1.1 * r, -90, HAT), colour)]
        if hat in BRIMS:
            grow, forward, light = BRIMS[hat]
            brim = [_apply(self.head, (grow * s, 0, forward + grow * c), crown, r)[:2]
                    for c, s in RING]
            under_dome = hat == "sunhat" or self.head[2][2] < 0         # a visor seen from behind
            shapes.insert(0 if under_dome else 1, (brim, _shade(colour, light)))
        for points, fill in shapes:
            self.polygon(points, fill)
        if hat == "beanie":
            self.disc(_apply(self.head, (0, -1.15, 0), crown, r), 0.26 * r, WHITE)

    def draw_box(self) -> None:
        """The crate under a sitting figure, from its hips to the ground."""
        lid, base = ([_apply(self.view, (x, y, z), self.points["pelvis"], self.scale)
                      for x, z in ((-0.17, -0.204), (0.17, -0.204), (0.17, 0.102), (-0.17, 0.102))]
                     for y in (0.075 * self.person.girth, self.ground))
        self.blob([(p, 1.0) for p in lid + base], _shade(self.person.crate, 0.82))
        self.polygon(lid, self.person.crate)


def _draw_backdrop(canvas: _Figure, rng: random.Random, palette: list[list[Colour]],
                   floor: float) -> None:
    """Sky or wall down to `floor` (y in [0, 1]), and the ground below it."""
    (sky, far, near, ground), *_ = palette
    pen, s = canvas.pen, canvas.image.width

    def rect(x0: float, y0: float, x1: float, y1: float, colour: Colour,
             draw: Callable = pen.rectangle) -> None:
        draw((x0 * s, y0 * s, x1 * s, y1 * s), fill=colour)

    def disc(x: float, y: float, r: float, colour: Colour, ry: float | None = None) -> None:
        rect(x - r, y - (ry or r), x + r, y + (ry or r), colour, pen.ellipse)

    kind = rng.choice(("hills", "hills", "trees", "sea", "room", "room", "halo", "dots", "stripes"))
    u = [rng.random() for _ in range(12)]
    pale = _mix(sky, WHITE, 0.45)
    rect(0, 0, 1, 1, sky)
    if kind in ("hills", "trees", "sea"):
        for k in range(1, 4):                               # the sky pales towards the horizon
            rect(0, floor * k / 4, 1, 1, _mix(sky, WHITE, 0.13 * k))
        disc(u[0], 0.08 + 0.16 * u[1], 0.06 + 0.04 * u[2], _mix((255, 214, 120), sky, 0.25))
        for x, y in ((u[3], u[4]), (u[5], u[6])):
            for dx, r in ((-0.06, 0.03), (0.0, 0.045), (0.06, 0.032)):
                disc(x * 1.1 - 0.05 + dx, 0.08 + 0.3 * y * floor, r * 1.3, pale, r)
    if kind == "hills":
        disc(u[7] * 0.5, floor + 0.2, 0.5, far, 0.2 + 0.2 * u[8])
        disc(0.6 + u[9] * 0.5, floor + 0.15, 0.45, near, 0.2 + 0.14 * u[10])
    elif kind == "trees":
        disc(0.5, floor + 0.1, 0.9, far, 0.2)
        for k in range(4):
            x, h = k * 0.3 + 0.18 * u[7 + k], 0.2 + 0.16 * u[(3 + k) % 12]
            leaves = _mix(near, far, 0.3 * (k % 2))
            rect(x - 0.012, floor - 0.1, x + 0.012, floor + 0.01, _shade(near, 0.72))
            if u[11] < 0.5:
                fir = ((x - 0.1, floor - 0.05), (x, floor - 0.1 - h), (x + 0.1, floor - 0.05))
                pen.polygon([(x * s, y * s) for x, y in fir], fill=leaves)
            else:
                disc(x, floor - 0.05 - 0.5 * h, 0.085, leaves, 0.45 * h + 0.03)
    elif kind == "sea":
        rect(0, floor - 0.14, 1, 1, near)
        for k in range(3):
            x, y = u[7 + k], floor - 0.11 + 0.035 * k
            rect(x - 0.1, y, x + 0.1, y + 0.01, _mix(near, WHITE, 0.5))
    elif kind == "room":
        if u[0] < 0.6:                                      # a window, or two paintings
            x = 0.08 + 0.5 * u[1]
            rect(x - 0.02, 0.1, x + 0.3, 0.1 + 0.6 * floor - 0.1, pale)
            rect(x, 0.12, x + 0.13, 0.6 * floor - 0.02, far)
            rect(x + 0.15, 0.12, x + 0.28, 0.6 * floor - 0.02, far)
        else:
            for k in range(2):
                x, y = 0.08 + 0.5 * k + 0.2 * u[2 + k], 0.12 + 0.15 * u[4 + k]
                rect(x, y, x + 0.18, y + 0.22, near)
                rect(x + 0.02, y + 0.02, x + 0.16, y + 0.2, pale)
        rect(0, floor - 0.03, 1, floor, pale)
    elif kind == "halo":
        disc(0.4 + 0.2 * u[0], floor - 0.4, 0.36 + 0.08 * u[1], far)
    elif kind == "dots":
        for k in range(30):
            disc((k % 6 + 0.5 * (k // 6 % 2)) / 5.5, (k // 6 + 0.4) / 5, 0.022, far)
    else:
        for k in range(5):
            rect(k / 5 + 0.04, 0, k / 5 + 0.1, 1, _mix(sky, far, 0.6))
    rect(0, floor, 1, 1.01, ground)
    rect(0, floor, 1, floor + 0.012, _mix(ground, near, 0.5))


class Figures(ImageDataset):
    """n images of people; image i depends on (seed, i) alone, not on the size or who asks when."""

    def __init__(self, n: int, size: int = 64, seed: int = 0):
        self.n, self.size, self.seed = n, size, seed

    def __len__(self) -> int:
        return self.n

    def source(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [S, S, 3] RGB; float32 [17, 3] of (x, y, 1 or HIDDEN), [0, 1] inside the frame."""
        if not 0 <= i < self.n:
            raise IndexError(f"figure {i}: there are {self.n}, numbered from 0")
        figure, pixels = self._draw(i), SUPERSAMPLE * self.size
        pose = np.array([(*figure.points[name][:2], 1) for name in keypoints.JOINTS], np.float32)
        pose[:, :2] /= pixels
        pose[[figure.covered(name) for name in keypoints.JOINTS], 2] = keypoints.HIDDEN
        return np.array(figure.image.reduce(SUPERSAMPLE)), pose

    def _draw(self, i: int) -> _Figure:
        rng, pixels = random.Random(f"{self.seed}/{i}"), SUPERSAMPLE * self.size
        palette = rng.choice(PALETTES)
        figure = _Figure(rng, palette, pixels)
        shadow = figure.points["shadow"]
        floor = min(0.97, max(0.45, shadow[1] / pixels - rng.uniform(0.03, 0.2)))
        _draw_backdrop(figure, rng, palette, floor)
        for wide, dark in ((0.3, 0.92), (0.22, 0.82)):
            w = wide * figure.scale
            figure.disc(shadow, w * (1 - figure.pose.lift), _shade(palette[0][3], dark), 0.24 * w)
        figure.draw()
        return figure
