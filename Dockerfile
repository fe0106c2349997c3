# dynlora in a container; how to use it: docs/howto/docker.md
#
#   docker build -t dynlora .                                              for CPUs
#   docker build -t dynlora:cuda --build-arg TORCH=cu128 .                 for NVIDIA's GPUs
#   docker run --rm -v "$PWD":/work -v dynlora-cache:/cache dynlora train recipe.yaml
ARG PYTHON=3.12

# The wheel, and what it needs as a list, so that packages stay in layers of their own when only dynlora changes.
FROM python:${PYTHON}-slim AS wheel
ARG EXTRAS=gguf,eval,serve
WORKDIR /source
COPY pyproject.toml ./
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *(r for e in sys.argv[1].split(',') if e for r in p['optional-dependencies'][e]), sep='\n')" "${EXTRAS}" > /requirements.txt
COPY README.md LICENSE ./
COPY scripts/package_readme.py scripts/
COPY dynlora_cli dynlora_cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
# cpu, or one of the CUDA builds at https://download.pytorch.org/whl, such as cu128
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

# Largest and least often changed first.
COPY constraints.txt /opt/dynlora/
RUN pip install -c /opt/dynlora/constraints.txt \
    --index-url "https://download.pytorch.org/whl/${TORCH}" --extra-index-url https://pypi.org/simple torch
COPY --from=wheel /requirements.txt /opt/dynlora/
RUN pip install -c /opt/dynlora/constraints.txt -r /opt/dynlora/requirements.txt
COPY --from=wheel /wheels/ /opt/dynlora/
RUN pip install --no-deps /opt/dynlora/*.whl

# Whoever runs it, also under another number (--user), can write to the cache: models, data sets, compiled kernels.
ENV HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache USER=dynlora
RUN useradd --uid 1000 --home-dir /cache --no-create-home dynlora \
    && mkdir -p /cache/huggingface /work \
    && chown -R dynlora:dynlora /cache /work \
    && chmod -R a+rwX /cache /work
USER dynlora
WORKDIR /work
VOLUME ["/cache"]
EXPOSE 8000
ENTRYPOINT ["dynlora"]
CMD ["--help"]
