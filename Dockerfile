# fastdcgan on a CUDA runtime with PyTorch:
#   docker build -t fastdcgan .
#   docker run --rm --gpus all -v fastdcgan:/home/dcgan fastdcgan train --amp --compile
FROM pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime

# torch.compile and Triton call a C and C++ compiler while they run; the runtime image has none.
# The base image fixes the distribution, which keeps one version of each: no pin of ours beside it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY fastdcgan /src/fastdcgan
COPY kernels /src/kernels
# The image's own torch satisfies the project's range, so pip leaves it as it is. A named volume on
# the user's home folder keeps runs and packed images.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-cache-dir /src \
    && useradd --create-home --uid 10001 dcgan
USER 10001
WORKDIR /home/dcgan
ENTRYPOINT ["fastdcgan"]
CMD ["--help"]
