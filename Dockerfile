FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Triton compiles its launchers with a C compiler. Ubuntu keeps no old versions of a package that could be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN python3 -m venv /opt/videoanchor \
    && /opt/videoanchor/bin/pip install --no-cache-dir --constraint /src/constraints.txt "/src[video,viz,batch]" \
    && rm -rf /src

# any user may run it: what libraries keep at home is lost with the container
ENV PATH=/opt/videoanchor/bin:$PATH HOME=/tmp
USER 1000
WORKDIR /work
ENTRYPOINT ["videoanchor"]
CMD ["--help"]
