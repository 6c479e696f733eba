# ppl-seg with the CPU build of torch, for machines without Python 3.11: see docs/containers.md
FROM python:3.11-slim
# for GPUs: docker build --build-arg PIP_FLAGS= .
ARG PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
WORKDIR /opt/ppl_seg
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY models models
COPY guides guides
# links to the two folders above are in it
COPY ppl_seg ppl_seg
RUN pip install --no-cache-dir $PIP_FLAGS -c constraints.txt . \
    && rm -rf build *.egg-info \
    && ppl-seg --version
# for users that the image does not know, as on clusters
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib MPLBACKEND=Agg PYTHONUNBUFFERED=1
WORKDIR /data
ENTRYPOINT ["ppl-seg"]
CMD ["--help"]
