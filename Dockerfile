# Two images from one file:
#   coordinator   no torch, no trainer: what a coordinator host needs
#   site          with CPU torch: sites, sealing a plan, synthetic notes
# Both run as an ordinary user on a file system that may be read-only; only /var/lib/mailboat and /data are written.

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/mailboat
ENV PATH=/opt/mailboat/bin:$PATH
# Build tool and pins first: they change less often than the sources.
COPY constraints.txt ./
RUN pip install -c constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY broker broker
COPY coordinator coordinator
COPY edge_client edge_client
COPY mailboat mailboat
COPY shared shared

FROM build AS build-coordinator
RUN pip install -c constraints.txt --no-build-isolation .

FROM build AS build-site
# The CPU build is asked for by name and index: an unqualified torch brings gigabytes of CUDA.
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu \
        "torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu"
RUN pip install -c constraints.txt --no-build-isolation '.[edge]'

FROM python:3.11-slim AS runtime
RUN useradd --uid 10001 --create-home --home-dir /var/lib/mailboat mailboat \
    && install -d -o mailboat -g mailboat /data
ENV PATH=/opt/mailboat/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKDIR /var/lib/mailboat
USER mailboat
# Volumes take over owner and mode of these folders.
VOLUME ["/var/lib/mailboat", "/data"]
ENTRYPOINT ["mailboat"]
CMD ["--help"]

FROM runtime AS coordinator
COPY --from=build-coordinator /opt/mailboat /opt/mailboat

FROM runtime AS site
COPY --from=build-site /opt/mailboat /opt/mailboat
COPY mailboat/assets/base-llama-16 /models/base-llama-16
