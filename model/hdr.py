"""Tone mapping: HDR pixels (PQ or HLG) as the 8-bit BT.709 pixels that a player shows on an SDR screen.

1. PQ (SMPTE ST 2084) or HLG (ARIB STD-B67, system gamma 1.2) to light, in units of the HDR reference white, 203 cd/m2
   (ITU-R BT.2408), which is 58 % of the PQ signal and 75 % of the HLG signal
2. BT.2020 or Display P3 primaries to BT.709; colours outside BT.709 are desaturated at equal luminance
3. the tone curve of ITU-R BT.2390 from a peak of 1,000 cd/m2 to the reference white, on the largest of R, G, B; all
   three are scaled alike, which keeps the hue. Light up to 88 cd/m2 stays as it is, more than the peak is white
4. the inverse of BT.1886 (gamma 2.4), the display function of SDR video

Every step is a table or an operation that IEEE 754 rounds exactly, so pixels are equal on every CPU. FFmpeg's `scale`
filter could do it too, but assumes a peak of 10,000 cd/m2 where a file has no metadata, so that the reference white
becomes grey (155 of 255), and needs four seconds per clip for its tables. Checkpoints contain this file. Requires
numpy.
"""

from functools import cache

import numpy as np

HDR_MODES = ("refuse", "tone_map")
TRANSFERS = {16: "PQ", 18: "HLG"}  # by the numbers of ITU-T H.273, which FFmpeg uses
BT709, BT2020, P3 = 1, 9, 12  # primaries, by the same numbers
TO_BT709 = {
    BT709: None,
    BT2020: ((1.660491, -0.587641, -0.07285), (-0.12455, 1.1329, -0.008349), (-0.018151, -0.100579, 1.11873)),
    P3: ((1.22494, -0.22494, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of linear BT.709
LUMINANCE_BT2020 = (0.2627, 0.678, 0.0593)
WHITE, PEAK = 203.0, 1000.0  # cd/m2
STRIP_PIXELS = 2**20  # converted at a time
STEPS = 2**16  # of every table


def refusal(what, transfer):
    """The reason why an HDR medium is not taken."""
    return f"HDR {what} ({TRANSFERS[transfer]}), convert it to SDR or set hdr to tone_map"


def to_sdr(codes, transfer, primaries):
    """uint16 [height, width, 3], full range R'G'B' -> uint8 [height, width, 3]. transfer: a key of TRANSFERS.
    primaries: a key of TO_BT709."""
    out = np.empty(codes.shape, np.uint8)
    rows = max(1, STRIP_PIXELS // codes.shape[1])
    for top in range(0, len(codes), rows):
        channels = [codes[top : top + rows, :, i] for i in range(3)]
        light = _light(channels, transfer)
        for i, channel in enumerate(_encoded(_in_gamut(light, TO_BT709[primaries]))):
            out[top : top + rows, :, i] = channel
    return out


def _light(channels, transfer):
    """[R, G, B] float32, linear, 1 = reference white."""
    light = [_linear_table(transfer)[channel] for channel in channels]
    if TRANSFERS[transfer] == "PQ":
        return light
    gain = _system_gamma()[_places(np.sqrt(np.sqrt(_weighted(light, LUMINANCE_BT2020))))]
    return [channel * gain for channel in light]


def _in_gamut(light, matrix):
    """Light in BT.709 primaries, without negative values."""
    if matrix is None:
        return light
    light = [_weighted(light, row) for row in matrix]
    lowest = np.minimum(np.minimum(light[0], light[1]), light[2])
    grey = np.maximum(_weighted(light, LUMINANCE), np.float32(0))
    outside = lowest < 0
    keep = np.where(outside, grey / np.where(outside, grey - lowest, np.float32(1)), np.float32(1))
    return [np.maximum(grey + (channel - grey) * keep, np.float32(0)) for channel in light]


def _encoded(light):
    """[R, G, B] uint8 after the tone curve and BT.1886."""
    largest = np.maximum(np.maximum(light[0], light[1]), light[2])
    capped = np.minimum(largest, np.float32(PEAK / WHITE))
    scale = _tone_curve()[_places(capped * np.float32(WHITE / PEAK))] * (capped / np.maximum(largest, np.float32(1e-9)))
    return [_display_codes()[_places(np.sqrt(np.minimum(channel * scale, np.float32(1))))] for channel in light]


def _weighted(channels, weights):
    red, green, blue = (channel * np.float32(weight) for channel, weight in zip(channels, weights, strict=True))
    return red + green + blue


def _places(values):
    """Positions in a table of STEPS over 0..1."""
    return (np.minimum(values, np.float32(1)) * np.float32(STEPS - 1) + np.float32(0.5)).astype(np.int32)


def _steps():
    return np.arange(STEPS) / (STEPS - 1)


def _pq_to_light(signal):
    """SMPTE ST 2084: signal 0..1 -> cd/m2."""
    powered = signal ** (32 / 2523)
    return 10_000 * (np.maximum(powered - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * powered)) ** (16384 / 2610)


def _light_to_pq(light):
    powered = (light / 10_000) ** (2610 / 16384)
    return ((107 / 128 + 2413 / 128 * powered) / (1 + 2392 / 128 * powered)) ** (2523 / 32)


@cache
def _linear_table(transfer):
    """By signal: light relative to the reference white; of HLG light of the scene, where 1 is the largest."""
    signal = _steps()
    if TRANSFERS[transfer] == "PQ":
        return (_pq_to_light(signal) / WHITE).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


@cache
def _system_gamma():
    """By the fourth root of the scene's luminance: factor from light of the scene to light of the screen."""
    return (PEAK / WHITE * _steps() ** (4 * 0.2)).astype(np.float32)


@cache
def _tone_curve():
    """By light / peak: factor of the curve of ITU-R BT.2390 (EETF); 1 up to the knee."""
    top = float(_light_to_pq(PEAK))
    signal, white = _light_to_pq(_steps() * PEAK) / top, float(_light_to_pq(WHITE)) / top
    knee = 1.5 * white - 0.5
    t = np.clip((signal - knee) / (1 - knee), 0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * white
    mapped = _pq_to_light(spline * top) / (np.maximum(_steps(), 1e-9) * PEAK)
    return np.where(signal < knee, 1, mapped).astype(np.float32)


@cache
def _display_codes():
    """By the square root of light: code of BT.1886, 0 to 255."""
    return np.rint(255 * _steps() ** (2 / 2.4)).astype(np.uint8)
