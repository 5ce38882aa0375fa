# brainprior: see docs/containers.md for the variants and how to run them.
#
#   docker build -t brainprior .                                    default index: on PyPI, CUDA
#   docker build -t brainprior --build-arg TORCH_INDEX=ADDRESS .    CPU, or another CUDA: the index
#                                                                   that pytorch.org names for it
ARG BASE=debian:bookworm-slim

# ---- the environment, with the tools that make it ----
FROM ${BASE} AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
    && python3 -m venv /opt/brainprior
WORKDIR /src
COPY constraints.txt .
# torch first and alone: a layer of its own, from its own index, which lacks the locked versions
# of what torch needs (those come with the rest)
ARG TORCH_INDEX=
RUN /opt/brainprior/bin/pip install --no-cache-dir --no-deps -c constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
# then what setup.cfg asks for, so that a change of our own code repeats none of it
COPY setup.cfg .
RUN python3 -c "import configparser as c; p = c.ConfigParser(); p.read('setup.cfg'); print(p['options']['install_requires'])" >requirements.txt \
    && /opt/brainprior/bin/pip install --no-cache-dir -c constraints.txt -r requirements.txt \
    # not needed to run: headers, static libraries, tools, the libraries' own tests
    && cd /opt/brainprior/lib/python3*/site-packages \
    && rm -rf torch/include torch/share torch/test \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find . -name '*.a' -delete \
    && find ants numpy pandas scipy sklearn skimage statsmodels sympy matplotlib nibabel \
        nilearn nipype nitransforms networkx h5py \
        -depth -type d \( -name tests -o -name test \) -exec rm -rf {} +
COPY . .
RUN /opt/brainprior/bin/pip install --no-cache-dir --no-deps . \
    && /opt/brainprior/bin/pip check \
    && /opt/brainprior/bin/pip uninstall -y -q pip setuptools

# ---- what is shipped ----
FROM ${BASE}
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
# what the provenance calls this image, for example NAME:TAG; an image does not know its own name
ARG IMAGE=
LABEL org.opencontainers.image.title="brainprior" \
    org.opencontainers.image.description="BIDS App that restores brain MRI with a 3-D diffusion prior" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE}" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 libstdc++6 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
COPY --from=build /opt/brainprior /opt/brainprior
# HOME: any user's; with a read-only root it moves into the work folder
ENV PATH=/opt/brainprior/bin:$PATH \
    HOME=/tmp \
    BRAINPRIOR_IMAGE=${IMAGE} \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /tmp
# the build fails where the image would not run; caches of user 1000 would be in other users' way
RUN brainprior --version && brainprior selftest --device cpu && find /tmp -mindepth 1 -delete
ENTRYPOINT ["brainprior"]
CMD ["--help"]
