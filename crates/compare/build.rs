//! Tells the program which versions it was built with, and generates the gRPC service of the peer `tonic`.

use std::path::Path;
use std::process::Command;

/// Packages whose version the report names, as the workspace's lock file has them.
const NAMED: [&str; 7] = ["buffstreams", "protosocket", "prost", "tokio", "tokio-util", "tonic", "zmq"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let lock_file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.lock");
    println!("cargo::rerun-if-changed={}", lock_file.display());
    println!("cargo::rerun-if-changed=build.rs");
    let locked = std::fs::read_to_string(&lock_file)?;
    for package in NAMED {
        let version = version_of(package, &locked).unwrap_or("unknown");
        let variable = package.to_uppercase().replace('-', "_");
        println!("cargo::rustc-env=VERSION_OF_{variable}={version}");
    }
    let rustc = Command::new(std::env::var("RUSTC")?).arg("--version").output()?;
    // Without the commit and the date in brackets.
    let rustc = String::from_utf8(rustc.stdout)?;
    let version = rustc.split(" (").next().unwrap_or_default().trim();
    println!("cargo::rustc-env=VERSION_OF_RUSTC={version}");

    #[cfg(feature = "tonic")]
    generate_service();
    Ok(())
}

/// In a lock file, the line after a package's name is its version.
fn version_of<'a>(package: &str, locked: &'a str) -> Option<&'a str> {
    let name = format!("name = \"{package}\"");
    let mut lines = locked.lines().skip_while(|line| *line != name);
    lines.nth(1)?.strip_prefix("version = \"")?.strip_suffix('"')
}

/// Two methods over messages that are written by hand, so that no `protoc` is needed.
#[cfg(feature = "tonic")]
fn generate_service() {
    use tonic_prost_build::manual::{Builder, Method, Service};

    let method = |name: &str, route: &str| {
        Method::builder().name(name).route_name(route).codec_path("tonic_prost::ProstCodec").client_streaming()
    };
    let service = Service::builder()
        .name("Sink")
        .package("compare")
        .method(
            method("take", "Take")
                .input_type("crate::systems::tonic::Parcel")
                .output_type("crate::systems::tonic::Taken")
                .build(),
        )
        .method(
            method("take_notes", "TakeNotes")
                .input_type("crate::note::Note")
                .output_type("crate::systems::tonic::Taken")
                .build(),
        )
        .method(
            method("echo", "Echo")
                .input_type("crate::systems::tonic::Parcel")
                .output_type("crate::systems::tonic::Parcel")
                .server_streaming()
                .build(),
        )
        .build();
    Builder::new().compile(&[service]);
}
