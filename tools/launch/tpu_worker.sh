#!/usr/bin/env bash
# Startup script of each worker of a TPU pod: mounts the share and runs the alignvlm command in its container.
#
# tpu_pod.sh passes this script and its metadata with the queued resource: alignvlm-image, alignvlm-share, alignvlm-name,
# and alignvlm-command (words quoted for the shell). The script runs at every boot, also after maintenance. Exit code 2
# of the command means that the user has to fix an error, and ends the script. After any other failure the command is run
# again, and resumes from its last checkpoint: another worker may have died, or the run was preempted or still has another
# writer (exit code 75). The status is in /run/alignvlm/status, and the log of each worker is on the share, in logs/NAME.
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
nfs_export=$(metadata share)
name=$(metadata name)
words=()
eval "words=($(metadata command))" # The words are quoted by tpu_pod.sh.

status "preparing"
mkdir -p "$share"
if ! mountpoint -q "$share"; then
  if ! command -v mount.nfs > /dev/null; then
    apt-get update -qq
    apt-get install -qq -y -o DPkg::Lock::Timeout=600 nfs-common
  fi
  mount -t nfs -o rw,hard,noatime "$nfs_export" "$share"
fi
mkdir -p "$share/logs/$name"
log=$share/logs/$name/$(hostname).log

# Access to Google's registries is by the service account of the worker.
gcloud auth configure-docker "${image%%/*}" --quiet || true
for attempt in 1 2 3 4 5; do
  docker pull --quiet "$image" && break
  ((attempt < 5)) || { status "failed: $image cannot be pulled"; exit 1; }
  sleep "${ALIGNVLM_RETRY_SECONDS:-20}"
done

for ((attempt = 1; ; attempt++)); do
  status "running (attempt $attempt)"
  code=0
  # A container needs privileges for the TPU, and the host's network for its metadata. By the name of the job, the
  # command knows that an earlier writer of its workdir was itself, and takes over at once.
  docker run --rm --name alignvlm --privileged --net=host --shm-size=16g --ulimit memlock=-1:-1 \
    --env "ALIGNVLM_JOB=queued resource $name" --volume "$share:/share" "$image" "${words[@]}" >> "$log" 2>&1 || code=$?
  case $code in
    0) status "done"; exit 0 ;;
    2) status "failed: $(tail -n 1 "$log")"; exit 0 ;;
  esac
  printf 'tpu_worker.sh: exit code %s, running the command again\n' "$code" >> "$log"
  docker rm --force alignvlm > /dev/null 2>&1 || true
  sleep "${ALIGNVLM_RETRY_SECONDS:-20}"
done
