"""Measures of pictures, flow and rate."""

from frameloom.metrics.flow import endpoint_error, outlier_share
from frameloom.metrics.frechet import frechet_distance, moments
from frameloom.metrics.image import ms_ssim, psnr, psnr_of_mean, ssim
from frameloom.metrics.rate import bd_rate, bits_per_pixel
from frameloom.metrics.stability import cropping_ratio, distortion, jitter, stability_score

__all__ = [
    "bd_rate",
    "bits_per_pixel",
    "cropping_ratio",
    "distortion",
    "endpoint_error",
    "frechet_distance",
    "jitter",
    "moments",
    "ms_ssim",
    "outlier_share",
    "psnr",
    "psnr_of_mean",
    "ssim",
    "stability_score",
]
