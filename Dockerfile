# trimtab on a CPU, from the package registry alone:
#     docker build -t trimtab .
#     docker run --rm -v "$PWD:/work" trimtab plan recipe.yaml
FROM python:3.11-slim
COPY . /source
# torch first: without a pinned version pip takes the build for GPUs, which is gigabytes larger
RUN pip install --no-cache-dir -c /source/constraints.txt torch==2.13.0 \
 && pip install --no-cache-dir -c /source/constraints.txt "/source[serve,audit]" \
 && rm -r /source
WORKDIR /work
ENTRYPOINT ["trimtab"]
