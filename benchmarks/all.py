"""Every benchmark, one after the other; the ones that need real footage run if a folder of clips is there.

python benchmarks/all.py [FOLDER]
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(name: str, *arguments: str) -> None:
    print(f"\n== {name} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], check=True)


def main() -> None:
    run("startup")
    run("world")
    run("compression")
    run("coding")
    run("fuzz", "--files", "700")
    run("generation")
    run("diffusion")
    run("motion")
    run("qmoe")
    run("serve")
    run("batch")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    clips = sorted(str(path) for path in folder.glob("*.mp4")) if folder and folder.is_dir() else []
    if not clips:
        print("\nno folder of clips: the benchmarks on real footage are left out")
        return
    run("interpolation", *clips, "--methods", "blend,dis-plain,minterpolate,dis,vfimamba")
    run("motion", *clips)
    run("stabilization", *clips)
    for clip in clips:
        run("passthrough", clip)
    run("sem", clips[0])
    run("rate", *clips)
    run("memory", clips[0])


if __name__ == "__main__":
    main()
