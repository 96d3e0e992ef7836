# A server on the CPU, without torch. Not built where lfx is developed, which has no container runtime.
#
#   docker build --tag lfx .
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume "$PWD/my-bundle:/model:ro" lfx
#
# The port is published on this machine alone: the server has no TLS (docs/trust.md).
# The slim image has no C++ compiler, without which lfx is installed without its kernels.
FROM python:3.11 AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[cpu,serve]" && useradd --create-home lfx
USER lfx
EXPOSE 8000
ENTRYPOINT ["lfx", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
