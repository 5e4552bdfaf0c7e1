# Two images: `server`, Triton with the Tandem backend, and `gateway`, the OpenAI API before it.
#   docker build --target server -t tandem-server .
#   docker build --target gateway -t tandem-gateway .

ARG TRITON_VERSION=26.07
ARG PYTHON_VERSION=3.12.11

FROM nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3 AS server
ARG TRITON_VERSION
LABEL org.opencontainers.image.title="Tandem" \
      org.opencontainers.image.description="Triton Inference Server with a backend for speculative decoding" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3"

# In a folder of their own, ahead of the image's packages: none of those is replaced, and what runs
# is what requirements.txt pins. On Linux torch's wheel is the CUDA build.
COPY requirements.txt requirements-client.txt /opt/tandem/
RUN python3 -m pip install --no-cache-dir --no-compile --target /opt/tandem/packages \
      -r /opt/tandem/requirements.txt -r /opt/tandem/requirements-client.txt

# Compile kernels and passes for CPUs when a server first runs on one. Any version does.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Laid out as a checkout is, to which Triton's folder of backends links.
COPY python_backend /opt/tandem/python_backend
COPY model_repository/tandem /opt/tandem/model_repository/tandem
COPY drafters /opt/tandem/drafters
# Makes the default verifier where there is none.
COPY scripts/fetch_models.py /opt/tandem/scripts/
RUN ln -s /opt/tandem/python_backend /opt/tritonserver/backends/tandem

# Nothing is written but to /tmp and /dev/shm: the root file system may be read-only.
ENV PYTHONPATH=/opt/tandem/packages \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
# With a name, for libraries that ask for it.
RUN useradd --uid 10001 --no-create-home tandem
USER 10001:10001
EXPOSE 8000 8001 8002 8004
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
  CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
# Through the base image's entry point, which ends in `exec`: the server is process 1.
CMD ["tritonserver", "--model-repository=/opt/tandem/model_repository", \
     "--disable-auto-complete-config", "--exit-timeout-secs=30"]


FROM python:${PYTHON_VERSION}-slim AS gateway
LABEL org.opencontainers.image.title="Tandem gateway" \
      org.opencontainers.image.description="The OpenAI API before Triton servers with Tandem" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY requirements-client.txt /opt/tandem/
RUN python3 -m pip install --no-cache-dir -r /opt/tandem/requirements-client.txt
COPY client /opt/tandem/client
COPY python_backend/tandem_options /opt/tandem/client/tandem_options
ENV PYTHONPATH=/opt/tandem/client \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 9000
HEALTHCHECK --interval=10s --timeout=5s \
  CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9000/', timeout=4)"]
ENTRYPOINT ["python3", "-m", "tandem_gateway.cli", "--host", "0.0.0.0"]
