#!/usr/bin/env bash
# The startup script of every worker of a TPU pod: mounts the share and runs the alignvlm command in its container.
#
# tpu_pod.sh hands it over with the queued resource, and what to run as metadata: alignvlm-image, alignvlm-share,
# alignvlm-name, alignvlm-command (words quoted for the shell). It runs at every boot, so also after maintenance.
# A command that a person must mend (exit code 2) is not tried again; any other failure is: another worker may have
# died, and the command goes on from its last checkpoint. What happened stands in /run/alignvlm/status, the log of each
# worker on the share, in logs/NAME.
set -euo pipefail

status_folder=${ALIGNVLM_STATUS_FOLDER:-/run/alignvlm}
share=${ALIGNVLM_SHARE_FOLDER:-/mnt/share}

metadata() {
  curl --silent --fail --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/alignvlm-$1"
}

status() {
  mkdir -p "$status_folder"
  printf '%s\n' "$*" > "$status_folder/status"
}

image=$(metadata image)
export_of_share=$(metadata share)
name=$(metadata name)
words=()
eval "words=($(metadata command))" # quoted by tpu_pod.sh

status "preparing"
mkdir -p "$share"
if ! mountpoint -q "$share"; then
  if ! command -v mount.nfs > /dev/null; then
    apt-get update -qq
    apt-get install -qq -y -o DPkg::Lock::Timeout=600 nfs-common
  fi
  mount -t nfs -o rw,hard,noatime "$export_of_share" "$share"
fi
mkdir -p "$share/logs/$name"
log=$share/logs/$name/$(hostname).log

# The registry of the image, if it is one of Google's, is read as the worker's service account.
gcloud auth configure-docker "${image%%/*}" --quiet || true
for attempt in 1 2 3 4 5; do
  docker pull --quiet "$image" && break
  ((attempt < 5)) || { status "failed: $image cannot be pulled"; exit 1; }
  sleep "${ALIGNVLM_RETRY_SECONDS:-20}"
done

for ((attempt = 1; ; attempt++)); do
  status "running (attempt $attempt)"
  code=0
  # Privileged and on the host's network: that is how a container gets at the TPU and its metadata.
  docker run --rm --name alignvlm --privileged --net=host --shm-size=16g --ulimit memlock=-1:-1 \
    --volume "$share:/share" "$image" "${words[@]}" >> "$log" 2>&1 || code=$?
  case $code in
    0) status "done"; exit 0 ;;
    2) status "failed: $(tail -n 1 "$log")"; exit 0 ;;
  esac
  printf 'tpu_worker.sh: exit code %s, trying again\n' "$code" >> "$log"
  docker rm --force alignvlm > /dev/null 2>&1 || true
  sleep "${ALIGNVLM_RETRY_SECONDS:-20}"
done
