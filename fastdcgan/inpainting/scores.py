"""How near a fill is to what was hidden: PSNR and SSIM inside the mask, beside fills that need no
generator. The formulas are scikit-image's, the other fills OpenCV's."""

from typing import Any

import cv2
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastdcgan.data.picture import Pixels
from fastdcgan.inpainting.masks import Mask

RADIUS = 3  # pixels about each that Telea's fill looks at: the value in OpenCV's own documentation


def inside(filled: Pixels, truth: Pixels, mask: Mask) -> dict[str, float]:
    """{"psnr": dB, "ssim": up to 1}: the means over the images of PSNR over the hidden pixels, and
    of the SSIM map's values at them (windows of 7 x 7, Wang et al. 2004).

    Args:
        filled, truth: (N, H, W, C) uint8.
        mask: their hole is what counts. PSNR of equal pixels is taken as 100 dB.
    """
    psnr, ssim = [], []
    for a, b in zip(truth, filled, strict=True):
        hidden = a[mask.hole], b[mask.hole]
        equal = np.array_equal(*hidden)
        psnr.append(100.0 if equal else peak_signal_noise_ratio(*hidden, data_range=255))
        _, ssim_map = structural_similarity(a, b, channel_axis=2, data_range=255, full=True)
        ssim.append(ssim_map[mask.hole].mean())
    return {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}


def rivals(images: Pixels, mask: Mask) -> dict[str, Pixels]:
    """The same images filled without a generator, by name: "mean" of what is seen, channel by
    channel, and "telea" (Telea 2004); where only a small image is seen, this "bicubic"; nothing
    where everything is.
    """
    n, height, width, _ = images.shape
    if mask.factor > 1:
        small = (width // mask.factor, height // mask.factor)
        shrunk = [cv2.resize(image, small, interpolation=cv2.INTER_AREA) for image in images]
        large = [cv2.resize(s, (width, height), interpolation=cv2.INTER_CUBIC) for s in shrunk]
        return {"bicubic": np.stack(large).reshape(images.shape)}
    if mask.sees_all:
        return {}
    hole: Any = mask.hole[None, :, :, None]
    means = images[:, ~mask.hole].mean(axis=1).round().astype(np.uint8)
    blank = np.where(hole, np.uint8(0), images)  # what is hidden is known to nobody
    hidden = mask.hole.astype(np.uint8)
    telea = [
        cv2.inpaint(np.ascontiguousarray(plane), hidden, RADIUS, cv2.INPAINT_TELEA)
        for image in blank
        for plane in np.moveaxis(image, 2, 0)
    ]
    planes = np.stack(telea).reshape(n, -1, height, width)
    return {
        "mean": np.where(hole, means[:, None, None], images),
        "telea": np.moveaxis(planes, 1, 3),
    }
