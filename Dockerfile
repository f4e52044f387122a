# An image with the command `virst`.
#
#   docker build -t virst .                                        CPU
#   docker build -t virst:cuda --build-arg EXTRAS=all,cuda .       NVIDIA GPUs; brings CUDA, needs the host's driver only
#   docker run --rm -v "$PWD:/work" virst demo
#   docker run --rm --gpus all -v "$PWD:/work" virst:cuda segment dog.mp4 "the dog" --model virst_7b --out masks
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
COPY pyproject.toml setup.py README.md LICENSE train.py eval.py /src/
COPY virst_jax /src/virst_jax
COPY configs /src/configs
COPY conversion /src/conversion
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist /src

FROM python:${PYTHON}-slim
ARG EXTRAS=all
COPY --from=build /dist /dist
RUN pip install --no-cache-dir "$(ls /dist/*.whl)[${EXTRAS}]" && rm -r /dist
ENV XDG_CACHE_HOME=/tmp/cache
WORKDIR /work
ENTRYPOINT ["virst"]
CMD ["--help"]
